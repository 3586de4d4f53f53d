// What the programs for Node have in common: they do what they are asked, one line after the other.
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

module.exports = { sleep, serve };
