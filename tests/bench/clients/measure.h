/* Shared by the clients of tests/bench/clients, in C and C++: counts messages, and measures the CPU time of the process.
 *
 * Each client is CLIENT PORT CONNECTIONS SIZE SECONDS. All connections have one message in flight, which the server sends
 * back. Half a second after the last connection is open, the measurement begins. At its end the process prints
 * "MICROSECONDS MESSAGES" (CPU time per message, and how many there were) and exits.
 */
#ifndef WSCHAT_BENCH_MEASURE_H
#define WSCHAT_BENCH_MEASURE_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

static int measure_port, measure_connections, measure_opened;
static size_t measure_size;
static double measure_seconds, measure_cpu_before;
static volatile long measure_messages; /* each client counts */
static long measure_messages_before;

static double measure_cpu(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
	       (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void measure_alarm(double seconds)
{
	struct itimerval timer;

	memset(&timer, 0, sizeof timer);
	timer.it_value.tv_sec = (time_t)seconds;
	timer.it_value.tv_usec = (suseconds_t)((seconds - (double)timer.it_value.tv_sec) * 1e6);
	setitimer(ITIMER_REAL, &timer, NULL);
}

/* The first signal begins the measurement, the second one ends it. */
static void measure_on_alarm(int number)
{
	char line[80];
	double spent;
	long messages;

	(void)number;
	if (measure_cpu_before == 0) {
		measure_cpu_before = measure_cpu();
		measure_messages_before = measure_messages;
		measure_alarm(measure_seconds);
		return;
	}
	spent = measure_cpu() - measure_cpu_before;
	messages = measure_messages - measure_messages_before;
	snprintf(line, sizeof line, "%.3f %ld\n", messages == 0 ? 0.0 : spent * 1e6 / (double)messages, messages);
	_exit(write(1, line, strlen(line)) < 0 || messages == 0);
}

/* A connection is open. */
static void measure_open(void)
{
	if (++measure_opened != measure_connections)
		return;
	signal(SIGALRM, measure_on_alarm);
	measure_alarm(0.5);
}

static void measure_fail(const char *sentence)
{
	fprintf(stderr, "%s\n", sentence);
	_exit(1);
}

static void measure_begin(int argc, char **argv)
{
	if (argc != 5)
		measure_fail("usage: CLIENT PORT CONNECTIONS SIZE SECONDS");
	measure_port = atoi(argv[1]);
	measure_connections = atoi(argv[2]);
	measure_size = (size_t)atol(argv[3]);
	measure_seconds = atof(argv[4]);
}

#endif
