/* A client of dsmq with hiredis: see harness.py for its commands. */
#include <hiredis/hiredis.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

static int port;
static const char *token;
static redisContext *context;

static int start(void) {
    if (context && !context->err) return 1;
    if (context) redisFree(context);
    context = redisConnect("127.0.0.1", port);
    if (!context || context->err) return 0;
    redisSetTimeout(context, (struct timeval){10, 0});
    if (!*token) return 1;
    redisReply *reply = redisCommand(context, "AUTH %s", token);
    int right = reply && reply->type != REDIS_REPLY_ERROR;
    if (reply && !right) printf("! %s\n", reply->str);
    freeReplyObject(reply);
    return right;
}

/* Return the reply, or NULL if the connection broke. */
static redisReply *call(int count, const char **words) { return start() ? redisCommandArgv(context, count, words, NULL) : NULL; }

static int is_error(redisReply *reply, const char *code) {
    return reply->type == REDIS_REPLY_ERROR && !strncmp(reply->str, code, strlen(code));
}

/* Print each message once; the last id and the epoch are the position. Returns the error that ends reading. */
static redisReply *read_all(const char *topic) {
    char after[24] = "0", epoch[80] = "unknown";
    for (;;) {
        const char *words[] = {"READ", topic, after, "WAIT", "500", "EPOCH", epoch};
        redisReply *reply = call(7, words);
        if (!reply) {
            usleep(50000);
            continue;
        }
        if (is_error(reply, "EPOCH ")) { /* Another server, or one that has lost its messages: all its messages are new. */
            sscanf(reply->str, "EPOCH %79s", epoch);
            strcpy(after, "0");
        } else if (reply->type == REDIS_REPLY_ERROR && !is_error(reply, "CLOSING ")) {
            return reply;
        }
        for (size_t at = 0; at + 5 <= reply->elements; at += 5) {
            sprintf(after, "%lld", reply->element[at]->integer);
            printf("- %s %s\n", after, reply->element[at + 3]->str);
            if (!strcmp(reply->element[at + 3]->str, "end")) {
                freeReplyObject(reply);
                return NULL;
            }
        }
        freeReplyObject(reply);
    }
}

/* Store each message once; report one that may have been stored in an earlier run of the server. */
static redisReply *write_all(const char *topic, int seq, int last) {
    char producer[32], body[16], run[80] = "unknown";
    sprintf(producer, "%d", getpid());
    for (int again = 0; seq <= last;) {
        sprintf(body, "%d", seq);
        const char *words[] = {"PUT", topic, body, "KEY", producer, body, "RUN", run, "AGAIN"};
        if (again) words[6] = "AGAIN", words[7] = "RUN", words[8] = run;
        redisReply *reply = call(again ? 9 : 8, words);
        if (!reply) {
            again = 1;
            usleep(50000);
            continue;
        }
        if (is_error(reply, "EPOCH ")) {
            sscanf(reply->str, "EPOCH %*s %79s", run);
            if (again) printf("? %d\n", seq++);
            again = 0;
        } else if (reply->type == REDIS_REPLY_INTEGER) {
            printf("- %lld %d\n", reply->integer, seq++);
            again = 0;
        } else if (!is_error(reply, "CLOSING ")) {
            return reply;
        }
        freeReplyObject(reply);
    }
    return NULL;
}

/* Return how many of the replies were ids, each above the previous one. */
static int pipeline(const char *topic, int count) {
    long long last = 0;
    int right = 0;
    redisReply *reply;
    if (!start()) return -1;
    for (int number = 0; number < count; number++) redisAppendCommand(context, "PUT %s %050d", topic, number);
    for (; count-- && redisGetReply(context, (void **)&reply) == REDIS_OK; freeReplyObject(reply)) {
        if (reply->type == REDIS_REPLY_INTEGER && reply->integer > last) last = reply->integer, right++;
    }
    return right;
}

/* Run the words, three per command, in a transaction. Returns the reply to EXEC. */
static redisReply *transaction(int count, const char **words) {
    const char *multi = "MULTI", *exec = "EXEC";
    redisReply *reply = call(1, &multi);
    for (int at = 0; reply && at < count; at += 3) {
        freeReplyObject(reply);
        reply = call(3, words + at);
    }
    if (!reply) return NULL;
    freeReplyObject(reply);
    return call(1, &exec);
}

static void show(redisReply *reply) {
    if (reply->type == REDIS_REPLY_INTEGER) printf(" %lld", reply->integer);
    if (reply->str) printf(" %s", reply->str);
    for (size_t at = 0; at < reply->elements; at++) show(reply->element[at]);
}

int main(int count, char **arguments) {
    char line[4096];
    const char *words[64];
    setvbuf(stdout, NULL, _IOLBF, 0);
    port = atoi(arguments[1]);
    token = arguments[3];
    while (fgets(line, sizeof line, stdin)) {
        count = 0;
        for (char *word = strtok(line, " \n"); word && count < 64; word = strtok(NULL, " \n")) words[count++] = word;
        int is_call = 1;
        redisReply *reply = NULL;
        if (!strcmp(words[0], "read")) {
            reply = read_all(words[1]), is_call = 0;
        } else if (!strcmp(words[0], "write")) {
            reply = write_all(words[1], atoi(words[2]), atoi(words[3])), is_call = 0;
        } else if (!strcmp(words[0], "pipeline")) {
            printf("= %d\n", pipeline(words[1], atoi(words[2])));
            continue;
        } else if (!strcmp(words[0], "transaction")) {
            reply = transaction(count - 1, words + 1);
        } else if (!strcmp(words[0], "shutdown")) {
            words[0] = "SHUTDOWN";
            reply = call(1, words);
        } else {
            reply = call(count - 1, words + 1);
        }
        if (!reply && is_call) {
            printf("! %s\n", context ? context->errstr : "no memory");
        } else {
            printf(reply && reply->type == REDIS_REPLY_ERROR ? "!" : "=");
            if (reply) show(reply);
            puts(reply ? "" : " done");
        }
        if (reply) freeReplyObject(reply);
    }
    return 0;
}
