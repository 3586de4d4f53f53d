// Shared by the Node programs: running commands line by line, and reading.
const readline = require("readline");

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const flat = (value) => [value].flat(Infinity).map((one) => (one instanceof Error ? one.message : one)).join(" ");

async function serve(commands) {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [name, ...words] = line.split(" ");
    try {
      console.log("=", flat(await commands[name](...words)));
    } catch (error) {
      console.log("!", error.message || String(error));
    }
  }
  process.exit();
}

// Print each message once; the last id and the epoch are the position.
const reader = ({ call, isReply }) => async (topic) => {
  let after = 0, epoch = "unknown";
  for (;;) {
    try {
      const found = await call("READ", topic, after, "WAIT", 500, "EPOCH", epoch);
      for (let at = 0; at < found.length; at += 5) {
        console.log("-", found[at], found[at + 3]);
        after = found[at];
        if (found[at + 3] === "end") return "done";
      }
    } catch (error) {
      // Another server, or one that has lost its messages: all its messages are new.
      const [code, current] = error.message.split(" ");
      if (code === "EPOCH") [after, epoch] = [0, current];
      else if (isReply(error) && code !== "CLOSING") throw error;
      else await sleep(50);
    }
  }
};

module.exports = { sleep, serve, reader };
