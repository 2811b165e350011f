// The colours of the style sheet, as the canvas needs them: resolved for the theme that holds now.

const probe = document.createElement("i");
probe.hidden = true;
document.documentElement.append(probe);

/** [r, g, b] of a variable of the style sheet. */
export function rgb(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}

export function css(name) {
  return `rgb(${rgb(name).join(" ")})`;
}

/** 256 colours [r, g, b] from the ramp's five. */
export function ramp() {
  const stops = [0, 1, 2, 3, 4].map((i) => rgb(`ramp-${i}`));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * 4;
    const low = Math.min(3, Math.floor(at));
    return stops[low].map((value, channel) => value + (stops[low + 1][channel] - value) * (at - low));
  });
}
