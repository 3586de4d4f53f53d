# A client of dsmq by redis-rb: see harness.py for what it is asked.
require "redis"
require "securerandom"

$stdout.sync = true
port, _, token = ARGV
# Sent again behind our back, a put could not be told from one that was never sent.
$redis = Redis.new(port: port.to_i, password: token.empty? ? nil : token, reconnect_attempts: 0)

# Print each message once: the id of the last one, and the epoch, say where to read on.
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
    # Another server, or one that has lost its messages: all it has is new.
    after, epoch = 0, current if code == "EPOCH"
    raise unless %w[EPOCH CLOSING].include?(code)
  rescue Redis::BaseConnectionError
    sleep 0.05
  end
end

# Store each message once; one that may have been stored in an earlier run of the server is told as doubtful.
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

# Each three words are a command.
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
