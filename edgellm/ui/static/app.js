// Starts the page: the live picture from /v1/cluster's events, and the chat.

import { showModels, startChat } from "./chat.js";
import { lost, note, show } from "./cluster.js";
import { events, request } from "./http.js";
import { read } from "./told.js";

const AGAIN_MS = 2000;

async function watch() {
  for (;;) {
    try {
      const response = await request("v1/cluster", { accept: "text/event-stream" });
      for await (const data of events(response)) show(read(JSON.parse(data)));
    } catch (error) {
      if (error.status) note(error.message);
    }
    lost();
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

async function nameModels() {
  for (;;) {
    try {
      return await showModels();
    } catch {
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }
}

startChat();
nameModels();
watch();
