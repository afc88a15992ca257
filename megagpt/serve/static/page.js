"use strict";

const at = (id) => document.getElementById(id);
let running = null; // the AbortController of the request under way

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

async function check(response) {
  if (response.ok) return response;
  if (response.status === 401) {
    at("key_label").hidden = false;
    at("key").focus();
  }
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered with status ${response.status}`);
}

function request() {
  const body = { prompt: at("prompt").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"]) {
    if (at(name).value !== "") body[name] = Number(at(name).value);
  }
  if (at("stop").value !== "") body.stop = at("stop").value;
  return body;
}

// The data of each server-sent event of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function generate() {
  at("echo").textContent = at("prompt").value;
  at("answer").textContent = "";
  say("generating…");
  const began = performance.now();
  const options = { method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal };
  const response = await check(await fetch("v1/completions", options));
  let finish = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new Error(piece.error.message);
    at("model").textContent = piece.model; // not known before where a key is needed
    for (const choice of piece.choices) {
      at("answer").append(choice.text);
      finish = choice.finish_reason ?? finish;
    }
    if (piece.usage) {
      const seconds = (performance.now() - began) / 1000;
      const n = piece.usage.completion_tokens;
      const why = finish === "stop" ? "the text has ended" : "as many as asked for";
      say(`${n} tokens in ${seconds.toFixed(1)} s (${(n / seconds).toFixed(1)} a second), ${why}`);
    }
  }
  if (finish === null) throw new Error("the connection has ended before the text");
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("generate").disabled = true;
  at("halt").disabled = false;
  try {
    await generate();
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    running = null;
    at("generate").disabled = false;
    at("halt").disabled = true;
  }
});

at("halt").addEventListener("click", () => running?.abort());
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});

fetch("v1/models", { headers: headers() })
  .then(check)
  .then((response) => response.json())
  .then((list) => (at("model").textContent = list.data.map((model) => model.id).join(", ")))
  .catch((error) => say(error.message, true));
