// Numbers with units, in as many digits as one can tell apart.

const NONE = "–";

/** 0.37, 4.2, 38, 1,234, 56k, 7.8M; a dash for what is not known. */
export function count(value) {
  if (value === null || value === undefined) return NONE;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${Math.round(value / 1e3)}k`;
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 1 ? 1 : 2);
}

/** 820 µs, 4.2 ms, 38 ms, 1.20 s */
export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value >= 100) return `${Math.round(value)} s`;
  if (value >= 1) return `${value.toFixed(value >= 10 ? 1 : 2)} s`;
  const ms = value * 1e3;
  if (ms >= 1 || ms === 0) return `${ms.toFixed(ms >= 10 || ms === 0 ? 0 : 1)} ms`;
  return `${Math.round(ms * 1e3)} µs`;
}

/** A share from 0 to 1 as a percentage. */
export function percent(value) {
  if (value === null || value === undefined) return NONE;
  const points = value * 100;
  return `${points > 0 && points < 9.95 ? points.toFixed(1) : Math.round(points)} %`;
}

/** 2.13 × */
export function times(value) {
  return value === null || value === undefined ? NONE : `${value.toFixed(2)} ×`;
}

/** 42 s, 3 min, 5 h 12 min, 3 d 4 h */
export function duration(value) {
  const s = Math.max(0, Math.floor(value));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
