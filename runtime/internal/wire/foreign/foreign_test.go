package foreign

import (
	"strings"
	"testing"
)

func TestProtocolsAreNamedByTheirFirstBytes(t *testing.T) {
	for _, c := range []struct{ first, want string }{
		{"*1\r\n$4\r\nPING\r\n", "Redis"},
		{"*12\r\n", "Redis"},
		{"PING\r\n", "Redis"},
		{"SLAVEOF 1.2.3.4 6379\r\n", "Redis"},
		{"set a 1\r\n", "Redis"},
		{"\x00\x00\x00\x08\x04\xd2\x16\x2f", "PostgreSQL"},                     // SSLRequest
		{"\x00\x00\x00\x08\x04\xd2\x16\x30", "PostgreSQL"},                     // GSSENCRequest
		{"\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01", "PostgreSQL"},     // CancelRequest
		{"\x00\x00\x00\x54\x00\x03\x00\x00user\x00postgres\x00", "PostgreSQL"}, // startup
		{"SSH-2.0-OpenSSH_9.2\r\n", "SSH"},
		{"\x16\x03\x01\x02\x00\x01", "TLS"},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"},
		{"AMQP\x00\x00\x09\x01", "AMQP"},
		{"\x10\x12\x00\x04MQTT\x04\x02", "MQTT"},
		{"\x10\x92\x01\x00\x04MQTT\x04\x02", "MQTT"},
		{"\x3a\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xdd\x07\x00\x00", "MongoDB"}, // OP_MSG
		{"\x3a\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xd4\x07\x00\x00", "MongoDB"}, // OP_QUERY
		{"GET /a HTTP/1.1\r\n", "HTTP/1"},
		{"CONNECT a:1 HTTP/1.1\r\n", "HTTP/1"},
	} {
		if got := Name([]byte(c.first)); got != c.want {
			t.Errorf("%q is %q, want %q", c.first, got, c.want)
		}
	}
}

func TestOtherBytesHaveNoName(t *testing.T) {
	for _, first := range []string{
		"", "*", "*1", "**\r\n", "*\r\n", "*1\r\n+", "EHLO a\r\n", "SETTLE", "GETTING", "GET", "SSH", "AMQ", "\x16", "\x16\x03", "\x10\x12\x00\x04MQ",
		"\x00\x00\x00\x08\x04\xd2\x16", "\x00\x00\x00\x08\x00\x03\x00\x00", "\x00\x01\x00\x00\x00\x03\x00\x00", strings.Repeat("\x00", 16),
		"\x3a\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\xdd\x07\x00\x00", "\xff\xff\xff\xff\x01\x00\x00\x00\x00\x00\x00\x00\xdd\x07\x00\x00",
		"\x20\x00\x00\x01\x85\xa6\x3f\x20",
	} {
		if got := Name([]byte(first)); got != "" {
			t.Errorf("%q is %q, want no name", first, got)
		}
	}
}

func FuzzName(f *testing.F) {
	f.Add([]byte("*1\r\n$4\r\nPING\r\n"))
	f.Add([]byte("\x00\x00\x00\x08\x04\xd2\x16\x2f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name := Name(b)
		if longer := Name(append(b[:len(b):len(b)], 'x')); len(b) >= 16 && longer != name {
			t.Fatalf("%q is %q, and %q with a byte more", b, name, longer)
		}
	})
}
