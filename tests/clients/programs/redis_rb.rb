# A client of dsmq with redis-rb: see harness.py for its commands.
require "redis"
require "securerandom"

$stdout.sync = true
port, _, token = ARGV
# If redis-rb retried puts by itself, a retry would look like a new put.
$redis = Redis.new(port: port.to_i, password: token.empty? ? nil : token, reconnect_attempts: 0)

# Print each message once; the last id and the epoch are the position.
def read(topic)
  after, epoch = 0, "unknown"
  loop do
    $redis.call("READ", topic, after, "WAIT", 500, "EPOCH", epoch).each_slice(5) do |id, _number, _age, body, _left|
      puts "- #{id} #{body}"
      after = id
      return "done" if body == "end"
    end
  rescue Redis::CommandError => error
    code, current = error.message.split
    # Another server, or one that has lost its messages: all its messages are new.
    after, epoch = 0, current if code == "EPOCH"
    raise unless %w[EPOCH CLOSING].include?(code)
  rescue Redis::BaseConnectionError
    sleep 0.05
  end
end

# Store each message once; report one that may have been stored in an earlier run of the server.
def write(topic, first, last)
  producer, run = SecureRandom.hex(8), "unknown"
  (first.to_i..last.to_i).each do |seq|
    again = []
    begin
      puts "- #{$redis.call("PUT", topic, seq, "KEY", producer, seq, *again, "RUN", run)} #{seq}"
    rescue Redis::CommandError => error
      code, _epoch, current = error.message.split
      raise unless %w[EPOCH CLOSING].include?(code)
      run = current if code == "EPOCH"
      retry if again.empty? || code == "CLOSING"
      puts "? #{seq}"
    rescue Redis::BaseConnectionError
      again = ["AGAIN"]
      sleep 0.05
      retry
    end
  end
  "done"
end

def pipeline(topic, count)
  $redis.pipelined { |pipe| count.to_i.times { |number| pipe.call("PUT", topic, format("%050d", number)) } }.uniq.size
end

# Run the words, three per command, in a transaction.
def transaction(*words)
  $redis.multi { |multi| words.each_slice(3) { |command| multi.call(*command) } }
end

commands = {
  "call" => $redis.method(:call), "read" => method(:read), "write" => method(:write),
  "pipeline" => method(:pipeline), "transaction" => method(:transaction), "shutdown" => $redis.method(:shutdown)
}
$stdin.each_line do |line|
  name, *words = line.split
  puts "= #{[commands[name].call(*words)].flatten.join(" ")}"
rescue Redis::BaseError => error
  puts "! #{error.message.lines.first&.strip}"
end
