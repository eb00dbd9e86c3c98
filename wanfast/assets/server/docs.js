// Shows the server's OpenAPI document: each call with its parameters and the fields of its body.

const made = (tag, ...content) => {
  const element = document.createElement(tag);
  element.append(...content);
  return element;
};

const limits = {
  minimum: value => `at least ${value}`,
  exclusiveMinimum: value => `more than ${value}`,
  maximum: value => `at most ${value}`,
  maxLength: value => `at most ${value} letters`,
};

function typeOf(schema) {
  const kinds = (schema.anyOf ?? [schema]).filter(kind => kind.type !== "null");
  return kinds.map(kind => {
    const words = Object.keys(limits).filter(name => name in kind).map(name => limits[name](kind[name]));
    return [kind.enum?.join(" or ") ?? kind.format ?? kind.type, ...words].join(", ");
  }).join(" or ");
}

function tableOf(caption, rows) {
  const head = ["Name", "Type", "Needed", "Default", "Meaning"].map(name => {
    const cell = made("th", name);
    cell.scope = "col";
    return cell;
  });
  const body = rows.map(({ name, schema, required, description }) => made(
    "tr", made("th", name), made("td", typeOf(schema)), made("td", required ? "yes" : "no"),
    made("td", schema.default == null ? "" : String(schema.default)), made("td", description ?? schema.description ?? ""),
  ));
  for (const row of body) row.firstElementChild.scope = "row";
  return made("table", made("caption", caption), made("thead", made("tr", ...head)), made("tbody", ...body));
}

function sectionOf(path, method, call) {
  const parameters = (call.parameters ?? []).filter(each => each.in !== "header");
  const section = made("section", made("h2", `${method.toUpperCase()} ${path}`), made("p", call.summary ?? ""));
  if (parameters.length) section.append(tableOf("Parameters", parameters));
  for (const [kind, { schema }] of Object.entries(call.requestBody?.content ?? {})) {
    const fields = Object.entries(schema.properties).map(
      ([name, each]) => ({ name, schema: each, required: schema.required?.includes(name) }),
    );
    section.append(tableOf(`Body: ${kind}`, fields));
  }
  return section;
}

const { paths } = await (await fetch("/openapi.json")).json();
for (const [path, calls] of Object.entries(paths)) {
  for (const [method, call] of Object.entries(calls)) document.getElementById("calls").append(sectionOf(path, method, call));
}
