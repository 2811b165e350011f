// What a program with the `openai` package for Node does, against the server at argv[2]. Prints what it has seen, as JSON.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "def add(a, b):" }];
const options = { model, messages, max_tokens: 12, temperature: 0 };
const seen = {};

const whole = await client.chat.completions.create(options);
seen.content = whole.choices[0].message.content;
assert.equal(whole.usage.completion_tokens, 12);

let text = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...options,
  stream: true,
  stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, seen.content);
assert.deepEqual(usage, whole.usage);

const helper = client.chat.completions.stream(options);
assert.equal(await helper.finalContent(), seen.content);

const completion = await client.completions.create({ model, prompt: "import ", max_tokens: 8, temperature: 0 });
assert.equal(completion.usage.completion_tokens, 8);

const tool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Weather at a place.",
    parameters: {
      type: "object",
      properties: { place: { type: "string", enum: ["Paris", "Oslo"] } },
      required: ["place"],
      additionalProperties: false,
    },
  },
};
const called = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the weather in Oslo?" }],
  tools: [tool],
  tool_choice: "required",
  parallel_tool_calls: false,
  max_tokens: 200,
  temperature: 0,
});
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "get_weather");
assert.ok(["Paris", "Oslo"].includes(JSON.parse(call.function.arguments).place));
seen.finish_reason = called.choices[0].finish_reason;

const runner = client.chat.completions.stream({
  model,
  messages: [{ role: "user", content: "What is the weather in Oslo?" }],
  tools: [tool],
  tool_choice: { type: "function", function: { name: "get_weather" } },
  max_tokens: 200,
  temperature: 0,
});
const final = await runner.finalChatCompletion();
assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), JSON.parse(call.function.arguments));

const response = await client.responses.create({ model, input: "def add(a, b):", max_output_tokens: 12, temperature: 0 });
seen.output_text = response.output_text;
const events = [];
for await (const event of await client.responses.create({
  model,
  input: "def add(a, b):",
  max_output_tokens: 12,
  temperature: 0,
  stream: true,
})) {
  events.push(event.type);
}
assert.equal(events[0], "response.created");
seen.last_event = events.at(-1);
assert.equal((await client.responses.retrieve(response.id)).output_text ?? seen.output_text, seen.output_text);

await assert.rejects(client.chat.completions.create({ ...options, temperature: -1 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});

const aborted = await client.chat.completions.create({ ...options, max_tokens: 500, stream: true });
for await (const _ of aborted) break; // leaving the loop closes the connection

console.log(JSON.stringify(seen));
