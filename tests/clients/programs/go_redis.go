// A client of dsmq with go-redis: see harness.py for its commands.
package main

import (
	"fmt"
	"os"
	"time"

	"gopkg.in/redis.v5"
)

var client = redis.NewClient(&redis.Options{
	Addr: "127.0.0.1:" + os.Args[1], Password: os.Args[3], ReadTimeout: 15 * time.Second,
})

func call(words ...any) (any, error) {
	command := redis.NewCmd(words...)
	client.Process(command)
	return result(command)
}

func result(command redis.Cmder) (any, error) {
	reply, err := command.(*redis.Cmd).Result()
	if err == redis.Nil {
		err = nil
	}
	return reply, err
}

// isReply returns whether the server replied with this error; the library has no type for that.
func isReply(err error) bool { return fmt.Sprintf("%T", err) == "internal.RedisError" }

func pipeline(topic string, count int) (any, error) {
	commands, err := client.Pipelined(func(pipe *redis.Pipeline) error {
		for number := 0; number < count; number++ {
			pipe.Process(redis.NewCmd("PUT", topic, fmt.Sprintf("%050d", number)))
		}
		return nil
	})
	ids := map[any]bool{}
	for _, command := range commands {
		id, _ := result(command)
		ids[id] = true
	}
	return len(ids), err
}

// transaction runs the words, three per command, in a transaction.
func transaction(words ...any) (any, error) {
	commands, err := client.TxPipelined(func(pipe *redis.Pipeline) error {
		for ; len(words) > 0; words = words[3:] {
			pipe.Process(redis.NewCmd(words[:3]...))
		}
		return nil
	})
	replies := []any{}
	for _, command := range commands {
		reply, _ := result(command)
		replies = append(replies, reply)
	}
	return replies, err
}

func shutdown() (any, error) { return client.Shutdown().Result() }
