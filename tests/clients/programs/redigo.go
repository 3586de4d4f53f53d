// A client of dsmq with redigo: see harness.py for its commands.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/gomodule/redigo/redis"
)

// A pool, as usual with redigo: the next Get replaces a broken connection.
var pool = &redis.Pool{Dial: func() (redis.Conn, error) {
	options := []redis.DialOption{redis.DialReadTimeout(10 * time.Second)}
	if token := os.Args[3]; token != "" {
		options = append(options, redis.DialPassword(token))
	}
	return redis.Dial("tcp", "127.0.0.1:"+os.Args[1], options...)
}}

func call(words ...any) (any, error) {
	conn := pool.Get()
	defer conn.Close()
	return conn.Do(words[0].(string), words[1:]...)
}

// isReply returns whether the server replied with this error; otherwise, the connection broke.
func isReply(err error) bool {
	_, is := err.(redis.Error)
	return is
}

func pipeline(topic string, count int) (any, error) {
	conn := pool.Get()
	defer conn.Close()
	for number := 0; number < count; number++ {
		if err := conn.Send("PUT", topic, fmt.Sprintf("%050d", number)); err != nil {
			return nil, err
		}
	}
	if err := conn.Flush(); err != nil {
		return nil, err
	}
	ids := map[int64]bool{}
	for number := 0; number < count; number++ {
		id, err := redis.Int64(conn.Receive())
		if err != nil {
			return nil, err
		}
		ids[id] = true
	}
	return len(ids), nil
}

// transaction runs the words, three per command, in a transaction.
func transaction(words ...any) (any, error) {
	conn := pool.Get()
	defer conn.Close()
	conn.Send("MULTI")
	for ; len(words) > 0; words = words[3:] {
		conn.Send(words[0].(string), words[1:3]...)
	}
	return conn.Do("EXEC")
}

func shutdown() (any, error) { return call("SHUTDOWN") }
