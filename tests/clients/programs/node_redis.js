// A client of dsmq with node-redis, version 3 (with callbacks) or later: see harness.py for its commands.
const redis = require(process.argv[2]);
const { sleep, serve, reader } = require("./serve.js");
const [port, protocol, token] = process.argv.slice(3);
const library = redis.addCommand ? withCallbacks() : withPromises();

function withCallbacks() {
  const client = redis.createClient({ port, password: token || undefined, retry_strategy: () => 50 });
  client.on("error", (error) => console.log("#", error.message));
  ["put", "read", "frobnicate"].forEach((name) => redis.addCommand(name));
  const promise = (call) => new Promise((resolve, reject) => call((error, reply) => (error ? reject(error) : resolve(reply))));
  const run = (multi, commands) => {
    for (const [name, ...words] of commands) multi[name.toLowerCase()](...words);
    return promise((done) => multi.exec(done));
  };
  return {
    call: (name, ...words) => promise((done) => client.send_command(name, words, done)),
    pipeline: (commands) => run(client.batch(), commands),
    transaction: (commands) => run(client.multi(), commands),
    shutdown: () => promise((done) => client.shutdown(done)),
    isReply: (error) => error instanceof redis.ReplyError && !(error instanceof redis.AbortError),
  };
}

function withPromises() {
  const socket = { port, reconnectStrategy: () => 50 };
  const client = redis.createClient({ socket, password: token || undefined, ...(protocol > 2 && { RESP: 3 }) });
  const tell = (error) => console.log("#", error.message);
  client.on("error", tell);
  client.connect().catch(tell);
  const queue = (commands) => commands.reduce((multi, words) => multi.addCommand(words.map(String)), client.multi());
  return {
    call: (...words) => client.sendCommand(words.map(String)),
    pipeline: (commands) => queue(commands).execAsPipeline(),
    transaction: (commands) => queue(commands).exec().catch((error) => error.replies || Promise.reject(error)),
    shutdown: () => client.sendCommand(["SHUTDOWN"]),
    isReply: (error) => error instanceof redis.ErrorReply,
  };
}

// Store each message once; report one that may have been stored in an earlier run of the server.
async function write(topic, first, last) {
  const producer = `${process.pid}-${Date.now()}`;
  let run = "unknown";
  for (let seq = Number(first); seq <= last; seq++) {
    for (let again = []; ; ) {
      try {
        console.log("-", await library.call("PUT", topic, seq, "KEY", producer, seq, ...again, "RUN", run), seq);
        break;
      } catch (error) {
        const [code, , current] = error.message.split(" ");
        if (code === "EPOCH") {
          run = current;
          if (!again.length) continue;
          console.log("?", seq);
          break;
        }
        if (!library.isReply(error)) again = ["AGAIN"];
        else if (code !== "CLOSING") throw error;
        await sleep(50);
      }
    }
  }
  return "done";
}

async function pipeline(topic, count) {
  const puts = Array.from({ length: count }, (_, number) => ["PUT", topic, String(number).padStart(50, "0")]);
  const replies = await library.pipeline(puts);
  return new Set(replies.filter(Number.isInteger)).size;
}

// Run the words, three per command, in a transaction.
function transaction(...words) {
  return library.transaction(Array.from({ length: words.length / 3 }, (_, at) => words.slice(at * 3, at * 3 + 3)));
}

serve({ call: library.call, read: reader(library), write, pipeline, transaction, shutdown: library.shutdown });
