// Fills the page: the form of a new video, the player, the queue and the history.

import { Refused, ask, key, lines } from "./ask.js";

const MOST_PAUSE_S = 15; // between two tries to reach the server
const $ = id => document.getElementById(id);
const form = $("new"), fields = form.elements;
const videos = new Map(); // id -> the video as the server sent it
const rows = new Map(); // id -> its row in the queue or in the history
const begun = new Map(); // id of a video that this page queued -> the quarters of it that were announced
let awaited = null; // the video to show when it is finished
let shown = null; // the video in the player
let older = null; // the id after which the history goes on
let mostBytes = Infinity; // of a request
let request = null; // names one press of the button, so that a second press after a lost answer is no second video

const hasEnded = video => video.status === "completed" || video.status === "failed";
const hasFile = video => video.status === "completed" && video.expires_at * 1000 > Date.now();
const nameOf = ({ prompt }) => (prompt.length > 80 ? `${prompt.slice(0, 80)}…` : prompt); // what is spoken
const path = (id, rest = "") => `/v1/videos/${id}${rest}`;

function set(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // a live region speaks on each change
}

// ---- a new video

const IMAGES = { input_reference: $("image"), last_image: $("last") }; // fields with a file, and where it is shown

for (const [name, image] of Object.entries(IMAGES)) {
  fields[name].addEventListener("change", () => {
    const [file] = fields[name].files;
    URL.revokeObjectURL(image.src);
    image.hidden = true; // until the browser has decoded it, which it cannot do for each format
    if (file) image.src = URL.createObjectURL(file);
  });
  image.addEventListener("load", () => { image.hidden = false; });
}

form.addEventListener("input", () => { request = null; });
form.addEventListener("submit", async event => {
  event.preventDefault();
  if ($("make").getAttribute("aria-disabled")) return;
  $("make").setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
  clearErrors();
  const body = new FormData(form);
  set("new-state", "Sending the request.");
  for (const [name, value] of [...body]) if (value === "" || value.size === 0) body.delete(name);
  request ??= [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16)).join("-");
  try {
    checkSize(Object.keys(IMAGES).filter(name => body.has(name)).map(name => ({ name, size: body.get(name).size })));
    const answer = await ask("/v1/videos", { method: "POST", body, headers: { "Idempotency-Key": request } });
    const video = await answer.json();
    request = null;
    awaited = video.id;
    begun.set(video.id, 0);
    set("new-state", "The video is queued.");
    put([videos.get(video.id) ?? video]); // the stream may have been earlier, and is newer then
    if (hasEnded(videos.get(video.id))) show(video.id, { takesFocus: false });
  } catch (error) {
    set("new-state", "");
    showError(error);
  }
  $("make").removeAttribute("aria-disabled");
});

// A body that is too large is refused before it is read, and then the browser may not read the answer.
function checkSize(images) {
  if (images.reduce((sum, image) => sum + image.size, 0) < mostBytes) return;
  const message = `${images.length > 1 ? "The images have" : "The image has"} more than ${mostBytes / 1e6} MB: choose a smaller one.`;
  const [largest] = images.toSorted((a, b) => b.size - a.size);
  throw new Refused(413, { message, param: largest.name });
}

const wordsOf = error => (error.status ? error.message : "The server cannot be reached. Press the button again.");

function clearErrors() {
  set("new-error", "");
  for (const field of fields) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}

function showError(error) {
  if (error.status === 401) return askForKey(error.message);
  set("new-error", wordsOf(error));
  const field = error.param && fields.namedItem(error.param);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", "new-error");
  const settings = field.closest("details");
  if (settings) settings.open = true;
  field.focus();
}

// ---- the player

async function show(id, { takesFocus }) {
  shown = id;
  const video = videos.get(id), player = $("player");
  URL.revokeObjectURL(player.src);
  player.removeAttribute("src");
  player.hidden = $("download").hidden = true;
  set("viewer-title", `Video: ${video.prompt}`);
  set("viewer-state", hasFile(video) ? "Loading the video." : stateOf(video));
  showFacts(video);
  if (takesFocus) $("viewer-title").focus();
  if (!hasFile(video)) return;
  try {
    const blob = await (await ask(path(id, "/content"))).blob();
    if (shown !== id) return;
    $("download").href = player.src = URL.createObjectURL(blob);
    $("download").download = `${id}.mp4`;
    player.hidden = $("download").hidden = false;
    set("viewer-state", stateOf(video));
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    if (shown === id) set("viewer-state", wordsOf(error));
  }
}

function showFacts(video) {
  const { total, ...stages } = video.seconds_by_stage ?? {};
  const facts = {
    Size: video.size,
    Length: `${video.seconds} s`,
    Seed: video.seed,
    Recipe: video.plan?.recipe ?? video.settings.recipe,
    Steps: video.settings.num_inference_steps,
    Seconds: total && `${total}: ${Object.entries(stages).map(pair => pair.join(" ")).join(", ")}`,
    Asked: new Date(video.created_at * 1000).toLocaleString(),
    "Kept until": video.expires_at && new Date(video.expires_at * 1000).toLocaleString(),
  };
  const known = Object.entries(facts).filter(([, value]) => value != null && value !== "");
  $("facts").replaceChildren(...known.flatMap(([name, value]) => [made("dt", name), made("dd", value)]));
}

function made(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

// ---- the queue and the history

function stateOf(video) {
  if (video.status === "queued") return video.queue_position ? `Waits. Videos before it: ${video.queue_position}.` : "Is next.";
  if (video.status === "in_progress") return `${video.progress} %, ${video.stage ?? "starting"}`;
  if (video.status === "failed") return video.error.code === "cancelled" ? "Cancelled." : `Failed: ${video.error.message}`;
  return hasFile(video) ? "Finished." : "Finished. Its file has expired.";
}

// Takes videos that are new or have changed, and shows them.
function put(changed) {
  const focused = document.activeElement;
  for (const video of changed) {
    const before = videos.get(video.id);
    videos.set(video.id, video);
    fill(rows.get(video.id) ?? newRow(video), video);
    announce(video);
    if (hasEnded(video) && before && !hasEnded(before) && (video.id === awaited || video.id === shown)) {
      show(video.id, { takesFocus: false });
    }
  }
  const queued = video => (video.status === "in_progress" ? -1 : video.queue_position ?? Infinity);
  arrange($("queue"), video => !hasEnded(video), (a, b) => queued(a) - queued(b) || a.queued_at - b.queued_at);
  arrange($("history"), hasEnded, (a, b) => b.queued_at - a.queued_at);
  if (focused !== document.activeElement && focused.isConnected) focused.focus(); // a row that moves loses it
}

function newRow(video) {
  const row = $("row").content.firstElementChild.cloneNode(true);
  const title = row.querySelector("h3");
  title.id = `title-${video.id}`;
  title.textContent = video.prompt;
  row.querySelector("progress").setAttribute("aria-labelledby", title.id);
  for (const button of row.querySelectorAll("button")) {
    button.setAttribute("aria-describedby", title.id);
    button.addEventListener("click", () => actions[button.name](video.id));
  }
  rows.set(video.id, row);
  return row;
}

function fill(row, video) {
  row.querySelector(".state").textContent = stateOf(video);
  const progress = row.querySelector("progress");
  progress.hidden = video.status !== "in_progress";
  progress.value = video.progress;
  const ended = hasEnded(video), show = { show: ended, again: true, cancel: !ended, delete: ended };
  for (const button of row.querySelectorAll("button")) button.hidden = !show[button.name];
  const image = row.querySelector("img");
  if (!hasFile(video) || image.alt) return;
  image.alt = "The first frame";
  ask(path(video.id, "/content?variant=thumbnail")).then(answer => answer.blob()).then(blob => {
    image.src = URL.createObjectURL(blob);
    image.hidden = false;
  }, () => {}); // the row is whole without it
}

// Puts the rows of a list into their order; rows that are in place do not move.
function arrange(list, belongs, order) {
  const wanted = [...videos.values()].filter(belongs).sort(order).map(video => rows.get(video.id));
  wanted.forEach((row, index) => {
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
}

// Says how far the videos of this page are: at each quarter, and at the end.
function announce(video) {
  if (!begun.has(video.id)) return;
  const quarter = Math.floor(video.progress / 25), said = begun.get(video.id);
  if (hasEnded(video)) {
    set("news", `${stateOf(video)} ${nameOf(video)}`);
    set("new-state", "");
    begun.delete(video.id);
  } else if (video.status === "in_progress" && quarter > said) {
    set("news", `${quarter * 25} percent of: ${nameOf(video)}`);
    begun.set(video.id, quarter);
  }
}

const actions = {
  show: id => show(id, { takesFocus: true }),
  again(id) {
    const video = videos.get(id);
    for (const field of fields) if (field.name && field.type !== "file") field.value = video.settings[field.name] ?? "";
    fields.recipe.value ||= "";
    form.querySelector("details").open = true;
    request = null;
    fields.prompt.focus();
  },
  async cancel(id) {
    const video = await changed(path(id, "/cancel"), "POST");
    if (!video) return;
    put([video]);
    $("queue-title").focus();
  },
  async delete(id) {
    if (!confirm(`Delete this video and its file? ${nameOf(videos.get(id))}`)) return;
    if (!await changed(path(id), "DELETE")) return;
    remove(id);
    set("news", "The video is deleted.");
  },
};

async function changed(where, method) {
  set("failed", "");
  try {
    return await (await ask(where, { method })).json();
  } catch (error) {
    if (error.status !== 404) return void showFailure(error);
    return {}; // another page was earlier
  }
}

// Shows why a button of the queue or of the history did nothing.
function showFailure(error) {
  if (error.status === 401) return askForKey(error.message);
  set("failed", wordsOf(error));
}

function remove(id) {
  const row = rows.get(id);
  if (!row) return;
  if (row.contains(document.activeElement)) row.closest("section").querySelector("h2").focus();
  URL.revokeObjectURL(row.querySelector("img").src);
  row.remove();
  rows.delete(id);
  videos.delete(id);
  begun.delete(id);
  if (shown !== id) return;
  shown = null;
  URL.revokeObjectURL($("player").src);
  $("player").removeAttribute("src");
  $("player").hidden = $("download").hidden = true;
  $("facts").replaceChildren();
  set("viewer-title", "Video");
  set("viewer-state", "No video is chosen.");
}

$("older").addEventListener("click", async () => {
  set("failed", "");
  try {
    const page = await (await ask(`/v1/videos?limit=20&after=${older}`)).json();
    put(page.data.filter(hasEnded));
    older = page.last_id;
    $("older").hidden = !page.has_more;
    set("news", `${page.data.length} older videos.`);
    if (!page.has_more) $("history-title").focus();
  } catch (error) {
    showFailure(error);
  }
});

// ---- the server

function askForKey(message) {
  $("key").hidden = false;
  set("key-error", key.get() ? message : "");
  $("key-value").focus();
}

$("key").addEventListener("submit", event => {
  event.preventDefault();
  key.set($("key-value").value.trim());
  $("key").reset();
  $("key").hidden = true;
  (fields.input_reference.disabled ? fields.prompt : fields.input_reference).focus();
});
$("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});

// Shows the server's model, its recipes, and what it takes for a field that is left empty.
async function describe() {
  const { data: [model] } = await (await ask("/v1/models")).json();
  set("model", model.id);
  const own = `the server's own${model.recipe ? `: ${model.recipe}` : ""}`;
  const others = model.recipes.filter(name => name !== model.recipe);
  const chosen = fields.recipe.value;
  fields.recipe.replaceChildren(new Option(own, ""), ...others.map(name => new Option(name, name)));
  fields.recipe.value = others.includes(chosen) ? chosen : "";
  mostBytes = model.max_upload_bytes;
  $("given").hidden = !model.takes_images;
  for (const name of Object.keys(IMAGES)) fields[name].disabled = !model.takes_images; // a disabled field is not sent
  for (const [name, value] of Object.entries(model.defaults)) fields.namedItem(name).placeholder = value;
}

function take(change) {
  const states = { ready: "The server is ready.", loading: "The server loads the models.", stopping: "The server stops." };
  set("connection", states[change.status]);
  set("waiting", `Videos that wait on this server: ${change.queued}.`);
  put(change.videos);
  change.deleted.forEach(remove);
  if (change.older && !older) {
    older = change.older;
    $("older").hidden = false;
  }
}

async function follow() {
  for (let pause_s = 1; ;) {
    let reason = "The connection to the server is lost.";
    try {
      await describe();
      $("forget").hidden = !key.get();
      for await (const change of lines("/v1/videos/events")) {
        take(change);
        pause_s = 1;
      }
    } catch (error) {
      if (error.status === 401) {
        set("connection", "The server needs an API key.");
        askForKey(error.message);
        await new Promise(done => $("key").addEventListener("submit", done, { once: true }));
        continue;
      }
      if (error.status) reason = `The server answered: ${error.message}.`;
    }
    set("connection", `${reason} The page tries again.`);
    await new Promise(done => setTimeout(done, pause_s * 1000));
    pause_s = Math.min(2 * pause_s, MOST_PAUSE_S);
  }
}

follow();
