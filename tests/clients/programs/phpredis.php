<?php
// A client of dsmq with phpredis: see harness.py for its commands.
[, $port, , $token] = $argv;
$redis = new Redis();

// A RedisException is an error reply or a broken connection; an error reply becomes a DomainException.
function call(string ...$words)
{
    global $redis, $port, $token;
    try {
        if (!$redis->isConnected()) {
            $redis->connect('127.0.0.1', (int) $port);
            $token === '' || $redis->auth($token);
        }
        return $redis->rawCommand(...$words);
    } catch (RedisException $error) {
        throw preg_match('/^[A-Z]+ /', $error->getMessage()) ? new DomainException($error->getMessage()) : $error;
    }
}

// Print each message once; the last id and the epoch are the position.
function read_all(string $topic): string
{
    [$after, $epoch] = [0, 'unknown'];
    while (true) {
        try {
            foreach (array_chunk(call('READ', $topic, $after, 'WAIT', 500, 'EPOCH', $epoch), 5) as [$id, , , $body]) {
                echo "- $id $body\n";
                $after = $id;
                if ($body === 'end') {
                    return 'done';
                }
            }
        } catch (DomainException $error) {
            [$code, $current] = explode(' ', $error->getMessage());
            if ($code === 'EPOCH') {
                // Another server, or one that has lost its messages: all its messages are new.
                [$after, $epoch] = [0, $current];
            } elseif ($code !== 'CLOSING') {
                throw $error;
            }
        } catch (RedisException) {
            usleep(50_000);
        }
    }
}

// Store each message once; report one that may have been stored in an earlier run of the server.
function write_all(string $topic, string $first, string $last): string
{
    [$producer, $run] = [bin2hex(random_bytes(8)), 'unknown'];
    for ($seq = (int) $first; $seq <= $last; $seq++) {
        $again = [];
        while (true) {
            try {
                $id = call('PUT', $topic, $seq, 'KEY', $producer, $seq, ...$again, ...['RUN', $run]);
                echo "- $id $seq\n";
                break;
            } catch (DomainException $error) {
                [$code, , $current] = explode(' ', $error->getMessage());
                if ($code !== 'EPOCH' && $code !== 'CLOSING') {
                    throw $error;
                }
                $run = $code === 'EPOCH' ? $current : $run;
                if ($code === 'EPOCH' && $again) {
                    echo "? $seq\n";
                    break;
                }
            } catch (RedisException) {
                $again = ['AGAIN'];
                usleep(50_000);
            }
        }
    }
    return 'done';
}

function pipeline(string $topic, string $count): int
{
    global $redis;
    call('PING');
    $pipe = $redis->pipeline();
    for ($number = 0; $number < $count; $number++) {
        $pipe->rawCommand('PUT', $topic, sprintf('%050d', $number));
    }
    return count(array_unique(array_filter($pipe->exec(), 'is_int')));
}

// Run the words, three per command, in a transaction.
function transaction(string ...$words): array|false
{
    global $redis;
    call('PING');
    $redis->multi();
    try {
        foreach (array_chunk($words, 3) as $command) {
            $redis->rawCommand(...$command);
        }
    } catch (RedisException $error) {
        $redis->discard();
        throw $error;
    }
    return $redis->exec();
}

$commands = ['call' => 'call', 'read' => 'read_all', 'write' => 'write_all', 'pipeline' => 'pipeline',
    'transaction' => 'transaction', 'shutdown' => fn () => call('SHUTDOWN')];
while ($line = fgets(STDIN)) {
    $words = explode(' ', trim($line));
    try {
        $reply = (array) $commands[array_shift($words)](...$words);
        $flat = [];
        array_walk_recursive($reply, function ($one) use (&$flat, $redis) {
            $flat[] = $one === false ? $redis->getLastError() : $one;
        });
        echo '= ', implode(' ', $flat), "\n";
    } catch (DomainException | RedisException $error) {
        echo '! ', $error->getMessage(), "\n";
    }
}
