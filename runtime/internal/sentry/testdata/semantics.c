// What a program sees of Linux's sockets, one line a check. semantics_test.go runs it under stock gVisor and under ours and
// compares the lines. The same program is the server:
//
//   semantics serve ADDRESS PORT    serves until it is killed
//   semantics run ADDRESS PORT      checks against a server
//   semantics local                 checks against a server of its own, on loopback
//
// A connection begins with a byte that no protocol begins with, so that a guard which only audits knows at once what it has.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/sockios.h>

enum { FRAME = 512, BIG = 8 << 20, MILLI = 1000 };

static struct sockaddr_in peer;
static char block[64 << 10];
static void *volatile nowhere = (void *)8; // no program has memory there

static long now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000L + t.tv_nsec / 1000000;
}

static void rest(int milliseconds) { usleep(milliseconds * MILLI); }

// ---- the server ----

static pthread_mutex_t report_lock = PTHREAD_MUTEX_INITIALIZER;
static char reports[16][200]; // by the tag that a connection gave itself

static int line_of(int fd, char *to, int size) {
	int n = 0;
	while (n < size - 1 && read(fd, to + n, 1) == 1 && to[n] != '\n') n++;
	to[n] = 0;
	return n;
}

static void *serve_one(void *argument) {
	int fd = (int)(long)argument;
	char command[64], *buffer = malloc(1 << 16), answer[200];
	long number = 0, tag = 0, total = 0, frames = 0, broken = 0, sum = 0;
	int on = 1, n;
	setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on);
	line_of(fd, command, sizeof command);
	char *name = command + 1;
	char *space = strchr(name, ' ');
	if (space) number = strtol(space, &space, 10);
	if (space) tag = atol(space) % 16;
	if (!strncmp(name, "report", 6)) {
		pthread_mutex_lock(&report_lock);
		if (write(fd, reports[number % 16], strlen(reports[number % 16])) < 0) perror("write");
		pthread_mutex_unlock(&report_lock);
	} else if (!strncmp(name, "close", 5)) {
	} else if (!strncmp(name, "reset", 5)) {
		struct linger l = {1, 0};
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	} else if (!strncmp(name, "echo", 4)) {
		while ((n = read(fd, buffer, 1 << 16)) > 0)
			if (write(fd, buffer, n) != n) break;
	} else if (!strncmp(name, "send", 4)) {
		memset(buffer, 'd', 1 << 16);
		for (long left = number; left > 0; left -= n)
			if ((n = write(fd, buffer, left < 1 << 16 ? left : 1 << 16)) <= 0) break;
		while (read(fd, buffer, 1 << 16) > 0) {}
	} else if (!strncmp(name, "shut", 4)) {
		shutdown(fd, SHUT_WR);
		while (read(fd, buffer, 1 << 16) > 0) {}
	} else { // sink, stall, frames: count what comes, then say so
		int is_frames = !strncmp(name, "frames", 6), at = 0;
		if (!strncmp(name, "stall", 5)) {
			rest(number);
		}
		static __thread char frame[FRAME];
		while ((n = read(fd, buffer, 1 << 16)) > 0) {
			for (int i = 0; i < n; i++) {
				sum = (sum * 31 + (unsigned char)buffer[i]) & 0xffffffff;
				if (!is_frames) continue;
				frame[at++] = buffer[i];
				if (at < FRAME) continue;
				frames++;
				for (at = 1; at < FRAME; at++)
					if (frame[at] != frame[0]) { broken++; break; }
				at = 0;
			}
			total += n;
		}
		snprintf(answer, sizeof answer, "%ld bytes, sum %ld, %ld frames, %ld broken, %s\n", total, is_frames ? 0 : sum, frames, broken,
			 n < 0 ? strerrorname_np(errno) : "end");
		pthread_mutex_lock(&report_lock);
		strcpy(reports[tag], answer);
		pthread_mutex_unlock(&report_lock);
		if (n == 0 && write(fd, answer, strlen(answer)) < 0) {}
	}
	close(fd);
	free(buffer);
	return NULL;
}

static void *serve_datagrams(void *argument) {
	int fd = (int)(long)argument;
	char buffer[65536];
	struct sockaddr_in from;
	for (;;) {
		socklen_t size = sizeof from;
		int n = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &size);
		if (n >= 0) sendto(fd, buffer, n, 0, (struct sockaddr *)&from, size);
	}
	return NULL;
}

static void serve(void) {
	int on = 1, small = 64 << 10, listener = socket(AF_INET, SOCK_STREAM, 0), datagrams = socket(AF_INET, SOCK_DGRAM, 0);
	pthread_t thread;
	signal(SIGPIPE, SIG_IGN);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
	if (bind(listener, (struct sockaddr *)&peer, sizeof peer) || listen(listener, 64) || bind(datagrams, (struct sockaddr *)&peer, sizeof peer)) {
		perror("serve");
		exit(1);
	}
	pthread_create(&thread, NULL, serve_datagrams, (void *)(long)datagrams);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		if (fd >= 0) pthread_create(&thread, NULL, serve_one, (void *)(long)fd);
	}
}

// ---- the checks ----

static volatile int checks;

static void say(const char *name, const char *form, ...) {
	va_list list;
	va_start(list, form);
	printf("%s: ", name);
	vprintf(form, list);
	printf("\n");
	fflush(stdout);
	va_end(list);
	checks++;
}

// told spells a result: the error, or the number.
static const char *told(long result) {
	static char text[8][32];
	static int next;
	char *to = text[next++ % 8];
	if (result < 0)
		snprintf(to, 32, "%s", strerrorname_np(errno));
	else
		snprintf(to, 32, "%ld", result);
	return to;
}

static int connect_to(int port, int flags) {
	struct sockaddr_in to = peer;
	to.sin_port = htons(port);
	int fd = socket(AF_INET, SOCK_STREAM | flags, 0);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
		int saved = errno;
		close(fd);
		errno = saved;
		return -1;
	}
	return fd;
}

static int dial(const char *command) {
	char text[64];
	int fd = connect_to(ntohs(peer.sin_port), 0);
	int n = snprintf(text, sizeof text, "\001%s\n", command);
	if (fd < 0 || write(fd, text, n) != n) {
		say("dial", "%s: %s", command, strerrorname_np(errno));
		exit(1);
	}
	return fd;
}

static const char *reply(int fd) {
	static char text[200];
	int n = 0, r;
	while (n < (int)sizeof text - 1 && (r = read(fd, text + n, sizeof text - 1 - n)) > 0) n += r;
	text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	return text;
}

static void nonblocking(int fd, int on) {
	int flags = fcntl(fd, F_GETFL);
	fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK);
}

static int polled(int fd, int events, int wait) {
	struct pollfd p = {fd, events, 0};
	return poll(&p, 1, wait) < 0 ? -1 : p.revents;
}

static int error_of(int fd) {
	int value = -1;
	socklen_t size = sizeof value;
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &value, &size);
	return value;
}

static const char *named(int number) { return number ? strerrorname_np(number) : "0"; }

// fill writes until there is no room, not even for a byte, and returns how much was taken. The pauses let what waits in
// between settle.
static long fill(int fd) {
	long total = 0, n;
	nonblocking(fd, 1);
	for (int quiet = 0; quiet < 5;) {
		n = write(fd, block, sizeof block);
		if (n < 0) n = write(fd, block, 1);
		if (n > 0) {
			total += n;
			quiet = 0;
		} else {
			if (errno != EAGAIN) say("fill", "%s", strerrorname_np(errno));
			quiet++;
			rest(50);
		}
	}
	return total;
}

static volatile sig_atomic_t signals, pipes;
static void on_signal(int number) { number == SIGPIPE ? pipes++ : signals++; }

static void handle(int number, int flags) {
	struct sigaction a = {.sa_handler = on_signal, .sa_flags = flags};
	sigaction(number, &a, NULL);
}

static void alarm_in(int milliseconds) {
	struct itimerval t = {.it_value = {milliseconds / 1000, milliseconds % 1000 * MILLI}};
	setitimer(ITIMER_REAL, &t, NULL);
}

static void connecting(void) {
	struct sockaddr_in to = peer, got;
	socklen_t size = sizeof got;
	int fd = dial("echo"), other;
	getpeername(fd, (struct sockaddr *)&got, &size);
	say("peer name", "%d", got.sin_port == peer.sin_port && got.sin_addr.s_addr == peer.sin_addr.s_addr);
	say("connect again", "%s", told(connect(fd, (struct sockaddr *)&to, sizeof to)));
	say("listen when connected", "%s", told(listen(fd, 1)));
	say("bind when connected", "%s", told(bind(fd, (struct sockaddr *)&got, size)));
	close(fd);

	fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	say("connect without waiting", "%s", told(connect(fd, (struct sockaddr *)&to, sizeof to)));
	say("writable when connected", "%d", polled(fd, POLLOUT, 2000));
	say("error when connected", "%s", named(error_of(fd)));
	say("connect when connected", "%s", told(connect(fd, (struct sockaddr *)&to, sizeof to)));
	close(fd);

	other = connect_to(8079, 0);
	say("connect to nobody", "%s", told(other));
	fd = connect_to(8079, SOCK_NONBLOCK);
	say("poll after a refusal", "%#x", polled(fd, POLLOUT | POLLIN, 2000));
	say("error after a refusal", "%s", named(error_of(fd)));
	say("error is told once", "%s", named(error_of(fd)));
	close(fd);

	fd = socket(AF_INET, SOCK_STREAM, 0);
	to.sin_family = AF_INET6;
	say("connect to another family", "%s", told(connect(fd, (struct sockaddr *)&to, sizeof to)));
	say("connect to half an address", "%s", told(connect(fd, (struct sockaddr *)&to, 4)));
	pipes = 0;
	long n = write(fd, "x", 1);
	say("write before connect", "%s, %d signals", told(n), (int)pipes);
	say("shutdown before connect", "%s", told(shutdown(fd, SHUT_WR)));
	say("read before connect", "%s", told(read(fd, block, 1)));
	say("poll before connect", "%#x", polled(fd, POLLOUT | POLLIN, 0));
	close(fd);
}

static void sending(void) {
	int fd = dial("echo"), pair[2], number = 0;
	char got[4096];
	say("an empty write", "%s", told(write(fd, "", 0)));
	say("an empty send", "%s", told(send(fd, "", 0, 0)));
	say("a write from nowhere", "%s", told(write(fd, nowhere, 10)));
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(page + 4096, 4096);
	memset(page, 'p', 4096);
	long n = write(fd, page + 4096 - 100, 200);
	say("a write that ends nowhere", "%s", told(n));
	while (n > 0 && number < n) number += read(fd, got, sizeof got);
	struct iovec v[2] = {{"ab", 2}, {nowhere, 2}};
	n = writev(fd, v, 2);
	say("a vector that ends nowhere", "%s", told(n));
	for (number = 0; n > 0 && number < n;) number += read(fd, got, sizeof got);
	static struct iovec many[1100];
	say("too long a vector", "%s", told(writev(fd, many, 1100)));
	say("pwrite", "%s", told(pwrite(fd, "x", 1, 0)));
	say("lseek", "%s", told(lseek(fd, 0, SEEK_SET)));
	say("pwritev2 at no position", "%s", told(pwritev2(fd, v, 1, -1, 0)));
	say("its echo", "%s", told(recv(fd, got, 2, MSG_WAITALL)));
	say("pwritev2 with a flag", "%s", told(pwritev2(fd, v, 1, -1, RWF_HIPRI)));
	say("a byte out of band", "%s", told(send(fd, "o", 1, MSG_OOB)));
	say("its echo", "%s", told(recv(fd, got, 1, MSG_WAITALL)));
	struct msghdr m = {.msg_iov = v, .msg_iovlen = 1};
	say("sendmsg out of band", "%s", told(sendmsg(fd, &m, MSG_OOB)));
	say("sendmsg without a copy", "%s", told(sendmsg(fd, &m, MSG_ZEROCOPY)));
	say("more to come", "%s", told(send(fd, "12", 2, MSG_MORE)));
	say("the rest", "%s", told(send(fd, "34", 2, 0)));
	n = recv(fd, got, 4, MSG_WAITALL);
	say("their echo", "%s %.4s", told(n), got);
	say("sendto with an address", "%s", told(sendto(fd, "x", 1, 0, (struct sockaddr *)&peer, sizeof peer)));
	say("its echo", "%s", told(recv(fd, got, 1, MSG_WAITALL)));
	char control[CMSG_SPACE(sizeof(int))] = {0};
	m.msg_control = control;
	m.msg_controllen = sizeof control;
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	*c = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
	say("a descriptor over the network", "%s", told(sendmsg(fd, &m, 0)));
	m.msg_control = NULL;
	m.msg_controllen = 0;
	struct mmsghdr list[3] = {{m, 0}, {m, 0}, {m, 0}};
	say("sendmmsg", "%s", told(sendmmsg(fd, list, 3, 0)));
	say("its counts", "%u %u %u", list[0].msg_len, list[1].msg_len, list[2].msg_len);
	say("its echo", "%s", told(recv(fd, got, 6, MSG_WAITALL)));
	close(fd);

	fd = dial("sink");
	char path[] = "/tmp/semantics-XXXXXX";
	int file = mkstemp(path);
	unlink(path);
	for (number = 0; number < 4; number++) n = write(file, block, sizeof block);
	off_t at = 100;
	say("sendfile", "%s", told(sendfile(fd, file, &at, 200000)));
	say("its offset", "%ld", (long)at);
	n = pipe(pair);
	n = write(pair[1], block, 10000);
	say("splice", "%s", told(splice(pair[0], NULL, fd, NULL, 10000, 0)));
	n = write(pair[1], block, 10);
	say("splice at a position", "%s", told(splice(pair[0], NULL, fd, &(loff_t){0}, 10, 0)));
	say("tee to a socket", "%s", told(tee(pair[0], fd, 10, 0)));
	shutdown(fd, SHUT_WR);
	say("what arrived of files", "%s", reply(fd));
	close(file);
	close(fd);
}

static void waiting(void) {
	int fd = dial("stall 5000"), epoll = epoll_create1(0); // until then there has to be no room, and all has to be seen of it
	struct epoll_event edge = {EPOLLOUT | EPOLLET, {0}}, level = {EPOLLOUT, {0}}, got;
	long sent = fill(fd), n;
	int queued = 0;
	char text[200];
	say("no room", "%s", told(write(fd, block, 1)));
	say("no room, MSG_DONTWAIT", "%s", told(send(fd, block, 1, MSG_DONTWAIT)));
	say("poll without room", "%#x", polled(fd, POLLOUT, 0));
	fd_set set;
	FD_ZERO(&set);
	FD_SET(fd, &set);
	say("select without room", "%s", told(select(fd + 1, NULL, &set, NULL, &(struct timeval){0, 0})));
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &edge);
	say("epoll without room", "%s", told(epoll_wait(epoll, &got, 1, 0)));
	ioctl(fd, SIOCOUTQ, &queued);
	say("bytes that wait", "%d", queued > 0);
	say("an edge when there is room", "%s", told(epoll_wait(epoll, &got, 1, 15000)));
	rest(300);
	epoll_wait(epoll, &got, 1, 0);
	say("no second edge", "%s", told(epoll_wait(epoll, &got, 1, 100)));
	epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &level);
	n = epoll_wait(epoll, &got, 1, 100);
	say("level", "%s %s", told(n), told(epoll_wait(epoll, &got, 1, 100)));
	for (n = 0; n < 300 && (ioctl(fd, SIOCOUTQ, &queued), queued > 0); n++) rest(10);
	say("nothing waits", "%d", queued);
	shutdown(fd, SHUT_WR);
	nonblocking(fd, 0);
	snprintf(text, sizeof text, "%ld bytes,", sent);
	say("what was taken arrived", "%d", !strncmp(reply(fd), text, strlen(text)));
	close(epoll);
	close(fd);

	fd = dial("stall 8000");
	struct timeval limit = {0, 200 * MILLI};
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	char *big = calloc(1, 2 * BIG);
	long begin = now();
	n = send(fd, big, 2 * BIG, 0);
	say("SO_SNDTIMEO takes a part", "%d", n > 0 && n < 2 * BIG);
	fill(fd);
	nonblocking(fd, 0);
	begin = now();
	n = send(fd, big, 1000, 0);
	say("SO_SNDTIMEO without room", "%s %d", told(n), now() - begin >= 150 && now() - begin < 4000);
	close(fd);

	fd = dial("stall 500");
	say("a write that waits", "%s", told(write(fd, big, BIG)));
	say("a send that waits", "%s", told(send(fd, big, BIG, 0)));
	shutdown(fd, SHUT_WR);
	say("what was waited for", "%.14s", reply(fd));
	close(fd);

	fd = dial("stall 8000");
	handle(SIGALRM, 0);
	fill(fd);
	nonblocking(fd, 0);
	alarm_in(150);
	signals = 0;
	n = write(fd, block, 1000);
	say("a signal without room", "%s, %d", told(n), (int)signals);
	close(fd);
	fd = dial("stall 8000");
	alarm_in(500);
	n = write(fd, big, 2 * BIG);
	say("a signal in the middle", "%d", n > 0 && n < 2 * BIG);
	close(fd);
	fd = dial("stall 2000");
	handle(SIGALRM, SA_RESTART);
	fill(fd);
	nonblocking(fd, 0);
	alarm_in(150);
	signals = 0;
	n = write(fd, block, 1000);
	say("a signal and SA_RESTART", "%s, %d", told(n), (int)signals);
	close(fd);
	fd = dial("stall 8000");
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	fill(fd);
	nonblocking(fd, 0);
	alarm_in(100);
	n = send(fd, block, 1000, 0);
	say("a signal and SO_SNDTIMEO", "%d", n < 1000);
	close(fd);
	free(big);
}

static void receiving(void) {
	int fd = dial("send 1000"), ready = 0;
	char got[2000];
	for (int i = 0; i < 200 && ready < 1000; i++) {
		rest(10);
		ioctl(fd, FIONREAD, &ready);
	}
	say("bytes to read", "%d", ready);
	say("a look", "%s", told(recv(fd, got, 10, MSG_PEEK)));
	ioctl(fd, FIONREAD, &ready);
	say("bytes after a look", "%d", ready);
	say("a part", "%s", told(read(fd, got, 400)));
	ioctl(fd, FIONREAD, &ready);
	say("bytes after a part", "%d", ready);
	say("bytes that are thrown away", "%s", told(recv(fd, got, 100, MSG_TRUNC)));
	say("the rest", "%s", told(recv(fd, got, 500, MSG_WAITALL)));
	say("nothing, MSG_DONTWAIT", "%s", told(recv(fd, got, 1, MSG_DONTWAIT)));
	struct timeval limit = {0, 100 * MILLI};
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	say("nothing, SO_RCVTIMEO", "%s", told(read(fd, got, 1)));
	say("poll when idle", "%#x", polled(fd, POLLIN | POLLOUT | POLLRDHUP, 0));
	close(fd);

	fd = dial("close");
	say("the end", "%s", told(read(fd, got, 1)));
	say("poll at the end", "%#x", polled(fd, POLLIN | POLLOUT | POLLRDHUP, 0));
	pipes = 0;
	long first = write(fd, "x", 1);
	rest(300);
	long second = write(fd, "x", 1);
	say("writes after the end", "%ld %s, %d signals", first, told(second), (int)pipes);
	close(fd);

	fd = dial("reset");
	rest(300);
	say("poll after a reset", "%#x", polled(fd, POLLIN | POLLOUT | POLLRDHUP, 0));
	say("read after a reset", "%s", told(read(fd, got, 1)));
	say("read again", "%s", told(read(fd, got, 1)));
	pipes = 0;
	long n = write(fd, "x", 1);
	say("write after a reset", "%s, %d signals", told(n), (int)pipes);
	close(fd);
	fd = dial("reset");
	rest(300);
	say("error after a reset", "%s", named(error_of(fd)));
	close(fd);
	fd = dial("shut");
	say("half of an end", "%s", told(read(fd, got, 1)));
	say("the other half", "%s", told(write(fd, "x", 1)));
	close(fd);
}

static void ending(void) {
	int fd = dial("stall 1000"); // the server must not end its side meanwhile
	char text[200];
	long n = write(fd, block, 1000);
	say("shutdown", "%s", told(shutdown(fd, SHUT_WR)));
	pipes = 0;
	n = write(fd, "x", 1);
	say("write after shutdown", "%s, %d signals", told(n), (int)pipes);
	pipes = 0;
	n = send(fd, "x", 1, MSG_NOSIGNAL);
	say("MSG_NOSIGNAL after shutdown", "%s, %d signals", told(n), (int)pipes);
	say("poll after shutdown", "%#x", polled(fd, POLLOUT, 0));
	say("what arrived before shutdown", "%s", reply(fd));
	close(fd);

	fd = dial("stall 1000");
	say("shutdown of nothing", "%s", told(shutdown(fd, 7)));
	say("shutdown of reading", "%s", told(shutdown(fd, SHUT_RD)));
	say("read after it", "%s", told(read(fd, text, 1)));
	say("write after it", "%s", told(write(fd, "x", 1)));
	say("shutdown of both", "%s", told(shutdown(fd, SHUT_RDWR)));
	say("poll after both", "%#x", polled(fd, POLLIN | POLLOUT | POLLRDHUP, 0));
	close(fd);

	fd = dial("stall 600");
	long sent = fill(fd);
	shutdown(fd, SHUT_WR);
	nonblocking(fd, 0);
	snprintf(text, sizeof text, "%ld bytes,", sent);
	say("what waited at shutdown arrived", "%d", !strncmp(reply(fd), text, strlen(text)));
	close(fd);

	fd = dial("stall 600 1");
	sent = fill(fd);
	say("close with bytes that wait", "%s", told(close(fd)));
	snprintf(text, sizeof text, "%ld bytes,", sent);
	int arrived = 0;
	for (int i = 0; i < 30 && !arrived; i++) {
		rest(200);
		fd = dial("report 1");
		arrived = !strncmp(reply(fd), text, strlen(text));
		close(fd);
	}
	say("what waited at close arrived", "%d", arrived);

	fd = dial("sink 0 2");
	n = write(fd, block, 100);
	rest(100);
	struct linger l = {1, 0};
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	close(fd);
	rest(300);
	fd = dial("report 2");
	const char *told_of = strrchr(reply(fd), ' ');
	say("close with SO_LINGER 0", "%s", told_of ? told_of + 1 : "?");
	close(fd);

	fd = dial("stall 8000");
	fill(fd);
	nonblocking(fd, 0);
	l.l_linger = 1;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	long begin = now();
	n = close(fd);
	long took = now() - begin;
	say("close with SO_LINGER 1", "%s, waits %d", told(n), took >= 900 && took < 2500);
	fd = dial("sink");
	n = write(fd, block, 10);
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
	begin = now();
	close(fd);
	say("close with SO_LINGER and nothing that waits", "%d", now() - begin < 700);
}

static void sharing(void) {
	int fd = dial("sink"), copy = dup(fd), status;
	nonblocking(fd, 1);
	say("a copy shares flags", "%d", (fcntl(copy, F_GETFL) & O_NONBLOCK) != 0);
	nonblocking(fd, 0);
	close(fd);
	say("a copy outlives", "%s", told(write(copy, "abc", 3)));
	if (fork() == 0) {
		_exit(write(copy, "child", 5) == 5 ? 0 : 1);
	}
	wait(&status);
	say("a child writes", "%d", WEXITSTATUS(status));
	say("the connection outlives the child", "%s", told(write(copy, "def", 3)));
	shutdown(copy, SHUT_WR);
	say("all of it arrived", "%s", reply(copy));
	close(copy);

	int pair[2];
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	fd = dial("sink");
	char control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec v = {"x", 1};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	*c = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
	memcpy(CMSG_DATA(c), &fd, sizeof fd);
	say("a descriptor is passed", "%s", told(sendmsg(pair[0], &m, 0)));
	close(fd);
	m.msg_controllen = sizeof control;
	say("and received", "%s", told(recvmsg(pair[1], &m, 0)));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
	say("and written to", "%s", told(write(fd, "passed", 6)));
	shutdown(fd, SHUT_WR);
	say("it arrived", "%s", reply(fd));
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	say("a socket opened again", "%s", told(open(path, O_RDWR)));
	close(fd);
	close(pair[0]);
	close(pair[1]);
}

static int shared;
static void *write_frames(void *argument) {
	char frame[FRAME];
	memset(frame, (int)(long)argument, sizeof frame);
	for (int i = 0; i < 100; i++) {
		if (i % 2) {
			struct iovec v[2] = {{frame, 100}, {frame + 100, FRAME - 100}};
			if (writev(shared, v, 2) != FRAME) return (void *)1;
		} else if (send(shared, frame, FRAME, 0) != FRAME) return (void *)1;
	}
	return NULL;
}

static void together(void) {
	pthread_t threads[8];
	long failed = 0;
	shared = dial("frames");
	for (long i = 0; i < 8; i++) pthread_create(&threads[i], NULL, write_frames, (void *)('a' + i));
	for (int i = 0; i < 8; i++) {
		void *result;
		pthread_join(threads[i], &result);
		failed += (long)result;
	}
	shutdown(shared, SHUT_WR);
	say("eight writers", "%ld failed, %s", failed, reply(shared));
	close(shared);
}

static void datagrams(int is_local) {
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct sockaddr_in nobody = peer, from;
	struct timeval limit = {2, 0};
	char got[70000];
	socklen_t size = sizeof from;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	say("a datagram to nowhere", "%s", told(send(fd, "x", 1, 0)));
	say("a datagram", "%s", told(sendto(fd, block, 1000, 0, (struct sockaddr *)&peer, sizeof peer)));
	say("its echo, cut", "%s", told(recvfrom(fd, got, 10, 0, (struct sockaddr *)&from, &size)));
	say("from", "%d", from.sin_port == peer.sin_port);
	say("an empty datagram", "%s", told(sendto(fd, "", 0, 0, (struct sockaddr *)&peer, sizeof peer)));
	say("its echo", "%s", told(recv(fd, got, 10, 0)));
	say("too long a datagram", "%s", told(sendto(fd, got, 65508, 0, (struct sockaddr *)&peer, sizeof peer)));
	say("connect", "%s", told(connect(fd, (struct sockaddr *)&peer, sizeof peer)));
	say("send", "%s", told(send(fd, "abc", 3, 0)));
	say("a look", "%s", told(recv(fd, got, 10, MSG_PEEK)));
	say("its length", "%s", told(recv(fd, got, 1, MSG_TRUNC)));
	struct iovec v[2] = {{"ab", 2}, {nowhere, 2}};
	say("a datagram that ends nowhere", "%s", told(writev(fd, v, 2)));
	struct sockaddr none = {AF_UNSPEC, {0}};
	say("disconnect", "%s", told(connect(fd, &none, sizeof none)));
	say("send after it", "%s", told(send(fd, "x", 1, 0)));
	nobody.sin_port = htons(8078);
	connect(fd, (struct sockaddr *)&nobody, sizeof nobody);
	say("send to nobody", "%s", told(send(fd, "x", 1, 0)));
	rest(200);
	say("and again", "%s", told(send(fd, "x", 1, 0)));
	say("shutdown", "%s", told(shutdown(fd, SHUT_WR)));
	say("send after shutdown", "%s", told(send(fd, "x", 1, MSG_NOSIGNAL)));
	close(fd);
	if (!is_local) return;
	int receiver = socket(AF_INET, SOCK_DGRAM, 0), sender = socket(AF_INET, SOCK_DGRAM, 0), small = 4096, whole = 1, count = 0;
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	bind(receiver, (struct sockaddr *)&here, sizeof here);
	size = sizeof here;
	getsockname(receiver, (struct sockaddr *)&here, &size);
	setsockopt(receiver, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
	connect(sender, (struct sockaddr *)&here, sizeof here);
	for (int i = 0; i < 100; i++) count += send(sender, block, 1000, 0) == 1000;
	say("datagrams without room at the receiver", "%d", count);
	for (count = 0;; count++) {
		int n = recv(receiver, got, sizeof got, MSG_DONTWAIT);
		if (n < 0) break;
		whole = whole && n == 1000;
	}
	say("some are lost, none is cut", "%d %d", count > 0 && count < 100, whole);
	close(receiver);
	close(sender);
}

static void accepting(void) {
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), other, value = 0;
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof here;
	say("flags of socket", "%d %d", fcntl(listener, F_GETFD), (fcntl(listener, F_GETFL) & O_NONBLOCK) != 0);
	say("accept before listen", "%s", told(accept(listener, NULL, NULL)));
	say("bind", "%s", told(bind(listener, (struct sockaddr *)&here, sizeof here)));
	getsockname(listener, (struct sockaddr *)&here, &size);
	say("bind again", "%s", told(bind(listener, (struct sockaddr *)&here, sizeof here)));
	say("listen", "%s", told(listen(listener, 8)));
	say("accept nothing", "%s", told(accept(listener, NULL, NULL)));
	say("accept4 with a strange flag", "%s", told(accept4(listener, NULL, NULL, 1)));
	other = socket(AF_INET, SOCK_STREAM, 0);
	say("an address in use", "%s", told(bind(other, (struct sockaddr *)&here, sizeof here)));
	size = sizeof value;
	getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &value, &size);
	say("SO_ACCEPTCONN", "%d", value);
	getsockopt(listener, SOL_SOCKET, SO_PROTOCOL, &value, &size);
	say("SO_PROTOCOL", "%d", value);
	getsockopt(listener, SOL_SOCKET, SO_TYPE, &value, &size);
	say("SO_TYPE", "%d", value);
	say("connect", "%s", told(connect(other, (struct sockaddr *)&here, sizeof here)));
	polled(listener, POLLIN, 1000);
	int accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	say("flags of accept4", "%d %d", fcntl(accepted, F_GETFD), (fcntl(accepted, F_GETFL) & O_NONBLOCK) != 0);
	say("write to a listener", "%s", told(send(listener, "x", 1, MSG_NOSIGNAL)));
	say("connect by a listener", "%s", told(connect(listener, (struct sockaddr *)&here, sizeof here)));
	say("what is accepted sends", "%s", told(write(accepted, "hello", 5)));
	say("and arrives", "%s", told(read(other, block, 100)));
	close(accepted);
	say("and ends", "%s", told(read(other, block, 100)));
	close(other);
	close(listener);
}

static void options(void) {
	int fd = dial("echo"), value, wanted[][3] = {
		{IPPROTO_TCP, TCP_NODELAY, 1}, {IPPROTO_TCP, TCP_CORK, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 33}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 5000},
		{IPPROTO_TCP, TCP_MAXSEG, 1000}, {SOL_SOCKET, SO_KEEPALIVE, 1}, {SOL_SOCKET, SO_REUSEADDR, 1}, {SOL_SOCKET, SO_OOBINLINE, 1},
		{IPPROTO_IP, IP_TOS, 0x10}, {IPPROTO_IP, IP_TTL, 17}, {SOL_SOCKET, SO_RCVBUF, 20000}, {SOL_SOCKET, SO_SNDBUF, 20000},
	};
	for (unsigned i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
		socklen_t size = sizeof value;
		char name[64];
		snprintf(name, sizeof name, "option %d %d", wanted[i][0], wanted[i][1]);
		int set = setsockopt(fd, wanted[i][0], wanted[i][1], &wanted[i][2], sizeof(int));
		const char *result = told(set);
		value = -1;
		getsockopt(fd, wanted[i][0], wanted[i][1], &value, &size);
		say(name, "%s %d", result, value);
	}
	say("a corked write", "%s", told(write(fd, "abc", 3)));
	value = 0;
	setsockopt(fd, IPPROTO_TCP, TCP_CORK, &value, sizeof value);
	say("its echo", "%s", told(recv(fd, block, 3, MSG_WAITALL)));
	struct tcp_info info = {0};
	socklen_t size = sizeof info;
	getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size);
	say("state", "%d", info.tcpi_state);
	say("short option", "%s", told(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, 1)));
	close(fd);
}

// watch ends a run in which nothing happens any more.
static void *watch(void *argument) {
	for (int before = -1; before != checks; rest(40000)) before = checks;
	printf("stuck behind %d checks\n", checks);
	fflush(stdout);
	kill(getpid(), SIGKILL);
	return argument;
}

static void all(int is_local) {
	pthread_t watcher;
	pthread_create(&watcher, NULL, watch, NULL);
	for (unsigned i = 0; i < sizeof block; i++) block[i] = 'a' + i % 26;
	handle(SIGPIPE, SA_RESTART);
	connecting();
	sending();
	waiting();
	receiving();
	ending();
	sharing();
	together();
	datagrams(is_local);
	options();
	if (is_local) accepting();
	say("checks", "%d", checks);
}

int main(int count, char **words) {
	const char *mode = count > 1 ? words[1] : "";
	int is_local = !strcmp(mode, "local");
	peer.sin_family = AF_INET;
	peer.sin_addr.s_addr = is_local ? htonl(INADDR_LOOPBACK) : inet_addr(count > 2 ? words[2] : "");
	peer.sin_port = htons(is_local ? 8081 : count > 3 ? atoi(words[3]) : 0);
	if (!strcmp(mode, "serve")) serve();
	if (is_local) {
		pid_t server = fork();
		if (server == 0) serve();
		rest(300);
		all(1);
		kill(server, SIGKILL);
	} else if (!strcmp(mode, "run")) {
		all(0);
	}
	return 0;
}
