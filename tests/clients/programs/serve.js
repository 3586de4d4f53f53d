// What the programs for Node have in common: they do what they are asked, one line after the other, and read alike.
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

// Print each message once: the id of the last one, and the epoch, say where to read on.
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
      // Another server, or one that has lost its messages: all it has is new.
      const [code, current] = error.message.split(" ");
      if (code === "EPOCH") [after, epoch] = [0, current];
      else if (isReply(error) && code !== "CLOSING") throw error;
      else await sleep(50);
    }
  }
};

module.exports = { sleep, serve, reader };
