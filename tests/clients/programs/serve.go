// Shared by the Go programs: running commands line by line, reading and writing.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// isClosing returns whether the request was not run because the server is stopping.
func isClosing(err error) bool { return strings.HasPrefix(err.Error(), "CLOSING ") }

// read prints each message once; the last id and the epoch are the position.
func read(topic string) (any, error) {
	after, epoch := int64(0), "unknown"
	for {
		reply, err := call("READ", topic, after, "WAIT", 500, "EPOCH", epoch)
		found, _ := reply.([]any)
		if err != nil && strings.HasPrefix(err.Error(), "EPOCH ") {
			// Another server, or one that has lost its messages: all its messages are new.
			after, epoch = 0, strings.Fields(err.Error())[1]
		} else if isReply(err) && !isClosing(err) {
			return nil, err
		} else if err != nil {
			time.Sleep(50 * time.Millisecond)
		}
		for ; len(found) > 0; found = found[5:] {
			after = found[0].(int64)
			fmt.Println("-", after, text(found[3]))
			if text(found[3]) == "end" {
				return "done", nil
			}
		}
	}
}

// write stores each message once; it reports one that may have been stored in an earlier run of the server.
func write(topic string, first, last int) (any, error) {
	producer, run := strconv.FormatInt(time.Now().UnixNano(), 36), "unknown"
	for seq, again := first, false; seq <= last; {
		words := []any{"PUT", topic, seq, "KEY", producer, seq}
		if again {
			words = append(words, "AGAIN")
		}
		id, err := call(append(words, "RUN", run)...)
		switch {
		case err == nil:
			fmt.Println("-", id, seq)
			seq, again = seq+1, false
		case strings.HasPrefix(err.Error(), "EPOCH "):
			run = strings.Fields(err.Error())[2]
			if again {
				fmt.Println("?", seq)
				seq, again = seq+1, false
			}
		case isReply(err) && !isClosing(err):
			return nil, err
		default:
			again = again || !isClosing(err)
			time.Sleep(50 * time.Millisecond)
		}
	}
	return "done", nil
}

func text(value any) string {
	switch value := value.(type) {
	case []byte:
		return string(value)
	case []any:
		parts := []string{}
		for _, part := range value {
			parts = append(parts, text(part))
		}
		return strings.Join(parts, " ")
	}
	return fmt.Sprint(value)
}

func main() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := []any{}
		for _, word := range strings.Fields(lines.Text()) {
			words = append(words, word)
		}
		number := func(at int) int { value, _ := strconv.Atoi(words[at].(string)); return value }
		var reply any
		var err error
		switch words[0] {
		case "read":
			reply, err = read(words[1].(string))
		case "write":
			reply, err = write(words[1].(string), number(2), number(3))
		case "pipeline":
			reply, err = pipeline(words[1].(string), number(2))
		case "transaction":
			reply, err = transaction(words[1:]...)
		case "shutdown":
			reply, err = shutdown()
		default:
			reply, err = call(words[1:]...)
		}
		if err != nil {
			fmt.Println("!", err)
		} else {
			fmt.Println("=", text(reply))
		}
	}
}
