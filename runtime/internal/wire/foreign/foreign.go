// Package foreign recognises protocols by the first bytes of a client, so that the refusal of what no parser here reads,
// or of what came to a peer of another protocol, can name it. Nothing is allowed because of a name.
package foreign

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// Name tells which protocol b begins, or "" when the bytes tell nothing. It looks at the first 16 bytes at most.
func Name(b []byte) string {
	b = b[:min(len(b), 16)]
	for _, p := range protocols {
		if p.begins(b) {
			return p.name
		}
	}
	return ""
}

var protocols = []struct {
	name   string
	begins func(b []byte) bool
}{
	{"TLS", func(b []byte) bool { return len(b) >= 3 && b[0] == 22 && b[1] == 3 }},
	{"HTTP/2", prefix("PRI * HTTP/2.0\r\n")},
	{"SSH", prefix("SSH-")},
	{"AMQP", prefix("AMQP")},
	{"MQTT", isMQTT},
	{"PostgreSQL", isPostgreSQL},
	{"MongoDB", isMongoDB},
	{"Redis", isRedis},
	{"HTTP/1", isHTTP},
}

func prefix(p string) func([]byte) bool {
	return func(b []byte) bool { return bytes.HasPrefix(b, []byte(p)) }
}

// isMQTT: a CONNECT packet with the protocol's name in it; its length has one or two bytes.
func isMQTT(b []byte) bool {
	name := []byte("\x00\x04MQTT")
	return len(b) >= 9 && b[0] == 0x10 && (bytes.HasPrefix(b[2:], name) || bytes.HasPrefix(b[3:], name))
}

// isPostgreSQL: a length and then version 3.0, or the code of SSLRequest, GSSENCRequest or CancelRequest ("Message
// Formats" in its manual).
func isPostgreSQL(b []byte) bool {
	if len(b) < 8 {
		return false
	}
	length, code := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	return code == 3<<16 && length > 8 && length < 10_000 ||
		length == 8 && (code == 80877103 || code == 80877104) || length == 16 && code == 80877102
}

// isMongoDB: the operation code OP_MSG, OP_COMPRESSED or OP_QUERY of a request that answers nothing.
func isMongoDB(b []byte) bool {
	if len(b) < 16 || binary.LittleEndian.Uint32(b[8:]) != 0 {
		return false
	}
	length, code := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[12:])
	return length > 16 && length <= 48_000_000 && (code == 2013 || code == 2012 || code == 2004)
}

// isRedis: an array of bulk strings, or a command that clients begin with as a line.
func isRedis(b []byte) bool {
	if len(b) >= 4 && b[0] == '*' {
		digits, rest, whole := strings.Cut(string(b[1:]), "\r\n")
		return whole && digits != "" && strings.Trim(digits, "0123456789") == "" && (rest == "" || rest[0] == '$')
	}
	word, _, _ := strings.Cut(string(b), " ")
	switch strings.ToUpper(strings.TrimRight(word, "\r\n")) {
	case "PING", "INFO", "SET", "SELECT", "SLAVEOF", "REPLICAOF", "CONFIG":
		return true
	}
	return false
}

// isHTTP: a method of RFC 9110 section 9 and then a target.
func isHTTP(b []byte) bool {
	method, target, _ := strings.Cut(string(b), " ")
	switch method {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH":
		return target != ""
	}
	return false
}
