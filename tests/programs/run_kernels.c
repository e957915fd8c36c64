/* Runs kernels that are linked to it, for a process on another machine's side of a pipe.
 *
 * First it writes how many kernels there are, their addresses in the order of the table, and those of
 * thread_number, thread_count and sched_yield. Then it answers requests, which are words of 8 bytes:
 *
 *     entry, argument, threads (0: call once, from no thread), pieces
 *     for each piece: address, bytes      whole pages
 *     the content of each piece
 *
 * by the pieces' content after the call. The memory between the pieces cannot be read or written.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef void kernel(void *arguments);
extern kernel *const kernels[];
extern const uint64_t kernel_count;

static __thread int number;
static int count;
static kernel *entry;
static void *argument;

static int thread_number(void) { return number; }
static int thread_count(void) { return count; }

static void *thread(void *given)
{
    number = (int)(intptr_t)given;
    entry(argument);
    return NULL;
}

static void die(const char *message)
{
    fprintf(stderr, "%s\n", message);
    exit(2);
}

static void fault(int signal_number, siginfo_t *info, void *context)
{
    (void)context;
    dprintf(2, "signal %d at %llu\n", signal_number, (unsigned long long)(uintptr_t)info->si_addr);
    _exit(3);
}

/* 0 at the end of the input. */
static int receive(void *into, size_t bytes)
{
    return fread(into, 1, bytes, stdin) == bytes;
}

static void send(const void *from, size_t bytes)
{
    if (fwrite(from, 1, bytes, stdout) != bytes)
        die("cannot write");
}

static void call(int threads)
{
    count = threads;
    if (!threads) {
        entry(argument);
        return;
    }
    pthread_t *all = calloc((size_t)threads, sizeof *all);
    for (intptr_t i = 0; i < threads; i++)
        if (pthread_create(&all[i], NULL, thread, (void *)i))
            die("cannot start a thread");
    for (int i = 0; i < threads; i++)
        pthread_join(all[i], NULL);
    free(all);
}

int main(void)
{
    struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGILL, &action, NULL);

    uint64_t helpers[] = {(uintptr_t)thread_number, (uintptr_t)thread_count, (uintptr_t)sched_yield};
    send(&kernel_count, sizeof kernel_count);
    send(kernels, kernel_count * sizeof *kernels);
    send(helpers, sizeof helpers);
    fflush(stdout);

    uint64_t head[4];
    while (receive(head, sizeof head)) {
        uint64_t pieces = head[3];
        uint64_t(*places)[2] = malloc(pieces * sizeof *places);
        if (!places || !receive(places, pieces * sizeof *places))
            die("a request is cut off");
        for (uint64_t i = 0; i < pieces; i++) {
            void *wanted = (void *)(uintptr_t)places[i][0];
            void *found = mmap(wanted, places[i][1], PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
            if (found != wanted)
                die("a piece of memory is taken");
            if (!receive(found, places[i][1]))
                die("a request is cut off");
        }
        entry = (kernel *)(uintptr_t)head[0];
        argument = (void *)(uintptr_t)head[1];
        call((int)head[2]);
        for (uint64_t i = 0; i < pieces; i++) {
            send((void *)(uintptr_t)places[i][0], places[i][1]);
            munmap((void *)(uintptr_t)places[i][0], places[i][1]);
        }
        fflush(stdout);
        free(places);
    }
    return 0;
}
