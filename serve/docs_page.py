"""The page at /docs: renders /openapi.json with a script of its own, and fetches nothing from elsewhere."""

__all__ = ["DOCS_HEADERS", "DOCS_HTML"]

DOCS_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
)

DOCS_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Dynamo KV</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.1rem; }
code { font-family: ui-monospace, monospace; font-size: .92em; }
details { border-top: 1px solid var(--line); } summary { padding: .6rem 0; cursor: pointer; }
summary b { display: inline-block; min-width: 3.5rem; } summary span { opacity: .75; margin-left: .75rem; }
table { border-collapse: collapse; width: 100%; margin: .25rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
</style>
<h1>Dynamo KV</h1>
<p id="lead">Reading <a href="/openapi.json">/openapi.json</a> …</p>
<main></main>
<script>
"use strict";
const make = (tag, text, ...children) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
};
const code = text => make("code", text);
const describe = (schema, all) => {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(option => describe(option, all)).join(" or ");
  if (schema.enum) return schema.enum.map(value => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `list of ${describe(schema.items || {}, all)}`;
  const low = schema.minimum ?? schema.exclusiveMinimum, high = schema.maximum ?? schema.exclusiveMaximum;
  const range = low === undefined && high === undefined ? "" :
    ` ${schema.exclusiveMinimum === undefined ? "from" : "above"} ${low} to ${high}`;
  return (schema.type || "anything") + range;
};
const note = schema => schema.description || (schema.anyOf || []).map(note).filter(Boolean).join(" ");
const fields = (name, all, seen) => {
  const schema = all[name];
  seen.add(name);
  const rows = Object.entries(schema.properties || {})
    .filter(([, field]) => !(field.type === "null"))
    .map(([key, field]) => make("tr", "",
      make("td", "", code(key)), make("td", describe(field, all)),
      make("td", (schema.required || []).includes(key) ? "required. " : "", note(field))));
  const refused = Object.entries(schema.properties || {}).filter(([, field]) => field.type === "null").map(([key]) => key);
  const parts = [make("h4", name), make("table", "", ...rows)];
  if (refused.length) parts.push(make("p", `Refused unless null: ${refused.join(", ")}.`));
  for (const other of JSON.stringify(schema).matchAll(/schemas\\/(\\w+)/g))
    if (!seen.has(other[1])) parts.push(...fields(other[1], all, seen));
  return parts;
};
const operation = (method, path, op, all) => {
  const box = make("details", "", make("summary", "", make("b", method.toUpperCase()), code(path), make("span", op.summary)));
  const body = op.requestBody?.content["application/json"].schema.$ref;
  if (body) box.append(make("h3", "Body"), ...fields(body.split("/").pop(), all, new Set()));
  box.append(make("h3", "Answers"));
  for (const [status, answer] of Object.entries(op.responses)) {
    box.append(make("p", "", code(status), " " + answer.description));
    const reply = status === "200" && answer.content["application/json"]?.schema.$ref;
    if (reply) box.append(...fields(reply.split("/").pop(), all, new Set()));
  }
  return box;
};
fetch("/openapi.json").then(answer => answer.json()).then(api => {
  document.getElementById("lead").textContent = `${api.info.description} Version ${api.info.version}. `;
  document.getElementById("lead").append(Object.assign(make("a", "openapi.json"), {href: "/openapi.json"}));
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, op] of Object.entries(methods)) {
      const group = op.tags[0];
      if (!groups.has(group)) groups.set(group, make("section", "", make("h2", group)));
      groups.get(group).append(operation(method, path, op, api.components.schemas));
    }
  document.querySelector("main").append(...groups.values());
}).catch(error => { document.getElementById("lead").textContent = `Cannot read /openapi.json: ${error}`; });
</script>
</html>
""".encode()
