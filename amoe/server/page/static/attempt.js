// The box to try a prompt. What the model says is shown as text and nothing else.

import { request } from "./server.js";
import { events } from "./sse.js";
import { seconds } from "./format.js";

const find = (id) => document.getElementById(id);

export class Attempt {
  #model = () => null;
  #onGuarded;
  #abort = null;

  /**
   * @param model says which model is served.
   * @param onGuarded is called when the server wants another key.
   */
  constructor(model, onGuarded) {
    this.#model = model;
    this.#onGuarded = onGuarded;
    find("try").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#abort === null) this.#run();
    });
    find("stop").addEventListener("click", () => this.#abort?.abort());
    find("prompt-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        find("try").requestSubmit();
      }
    });
  }

  async #run() {
    this.#abort = new AbortController();
    this.#setBusy(true);
    const answer = find("answer");
    answer.replaceChildren();
    const run = { started: performance.now(), first: null, last: null, tokens: 0, finish: null, prompt: null };
    try {
      await this.#stream(run, answer);
      tell(summary(run, run.finish ? `finished: ${run.finish}` : "the stream ended early"));
    } catch (error) {
      if (error.name === "AbortError") tell(summary(run, "stopped"));
      else {
        append(answer, error.message, "error");
        tell("failed");
      }
    } finally {
      this.#abort = null;
      this.#setBusy(false);
    }
  }

  async #stream(run, answer) {
    const isChat = new FormData(find("try")).get("mode") === "chat";
    tell("waiting for the first token");
    const response = await request(isChat ? "v1/chat/completions" : "v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body(isChat, this.#model())),
      signal: this.#abort.signal,
    }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
    });
    if (!response.ok) {
      if (response.status === 401) this.#onGuarded();
      throw new Error(await reason(response));
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      take(run, event, answer);
    }
  }

  #setBusy(isBusy) {
    find("send").disabled = isBusy;
    find("stop").disabled = !isBusy;
    find("answer").setAttribute("aria-busy", String(isBusy));
  }
}

function body(isChat, model) {
  const prompt = find("prompt-text").value;
  return {
    ...(model ? { model } : {}),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number(find("max-tokens").value),
    temperature: Number(find("temperature").value),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

/** What an error response says. */
async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function take(run, event, answer) {
  const choice = event.choices[0];
  const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
  const text = choice?.text ?? choice?.delta?.content ?? "";
  const now = performance.now();
  const tokens = event.usage?.completion_tokens ?? run.tokens;
  if (tokens > run.tokens) {
    run.first ??= { at: now, tokens };
    run.last = now;
    run.tokens = tokens;
  }
  run.finish = choice?.finish_reason ?? run.finish;
  run.prompt = event.usage?.prompt_tokens ?? run.prompt;
  append(answer, thought, "thought");
  append(answer, text, "said");
  tell(summary(run, ""));
}

/** Adds text; a look at the end stays at the end. */
function append(answer, text, kind) {
  if (!text) return;
  const isAtEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 24;
  if (answer.lastChild?.className !== kind) {
    const part = document.createElement("span");
    part.className = kind;
    part.append("");
    answer.append(part);
  }
  answer.lastChild.firstChild.appendData(text);
  if (isAtEnd) answer.scrollTop = answer.scrollHeight;
}

function summary(run, end) {
  const parts = [];
  if (end) parts.push(end);
  parts.push(`${run.tokens} token${run.tokens === 1 ? "" : "s"}`);
  if (run.first !== null) {
    const span = (run.last - run.first.at) / 1000;
    const later = run.tokens - run.first.tokens;
    if (span > 0 && later > 0) parts.push(`${(later / span).toFixed(1)} tokens/s`);
    parts.push(`first after ${seconds((run.first.at - run.started) / 1000)}`);
  }
  return parts.join(" · ");
}

function tell(text) {
  find("try-status").textContent = text;
}
