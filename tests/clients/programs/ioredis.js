// A client of dsmq with ioredis: see harness.py for its commands.
const Redis = require(process.argv[2]);
const { sleep, serve, reader } = require("./serve.js");
const [port, , token] = process.argv.slice(3);
const client = new Redis({ port, password: token || undefined, retryStrategy: () => 50 });
client.on("error", (error) => console.log("#", error.message));
const isReply = (error) => error.name === "ReplyError";
const library = { call: (...words) => client.call(...words), isReply };

// Store each message once; report one that may have been stored in an earlier run of the server.
// When its connection breaks, this library repeats requests by itself, so any put may be a repetition.
async function write(topic, first, last) {
  const producer = `${process.pid}-${Date.now()}`;
  let run = "unknown";
  for (let seq = Number(first); seq <= last; seq++) {
    for (;;) {
      const again = seq > first ? ["AGAIN"] : [];
      try {
        console.log("-", await library.call("PUT", topic, seq, "KEY", producer, seq, ...again, "RUN", run), seq);
        break;
      } catch (error) {
        const [code, , current] = error.message.split(" ");
        if (code === "EPOCH") {
          const isDoubtful = run !== "unknown";
          run = current;
          if (!isDoubtful) continue;
          console.log("?", seq);
          break;
        }
        if (isReply(error) && code !== "CLOSING") throw error;
        await sleep(50);
      }
    }
  }
  return "done";
}

async function pipeline(topic, count) {
  const pipe = client.pipeline();
  for (let number = 0; number < count; number++) pipe.call("PUT", topic, String(number).padStart(50, "0"));
  const replies = await pipe.exec();
  for (const [error] of replies) if (error) throw error;
  return new Set(replies.map(([, id]) => id)).size;
}

// Run the words, three per command, in a transaction.
async function transaction(...words) {
  const multi = client.multi();
  for (let at = 0; at < words.length; at += 3) multi.call(...words.slice(at, at + 3));
  return (await multi.exec()).map(([error, id]) => (error ? error.message : id));
}

serve({ call: library.call, read: reader(library), write, pipeline, transaction, shutdown: () => client.shutdown() });
