package mysql

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// requestBytes is the fixed part of a handshake response: flags, maximum packet, collation, 23 bytes of filler. Alone it
// is an SSLRequest.
const requestBytes = 32

// request checks the fixed part at the front of p and returns its flags.
func request(p []byte) (flags uint32, err error) {
	flags = binary.LittleEndian.Uint32(p)
	if stranger := flags &^ (allowedCapabilities | clientSSL); stranger != 0 {
		return 0, wire.Unsupported("capability flags %#x", stranger)
	}
	if missing := requiredCapabilities &^ flags; missing != 0 {
		return 0, wire.Unsupported("a handshake without capability flags %#x", missing)
	}
	if !charsetAllowed(p[8]) {
		return 0, wire.Unsupported("collation %d in the handshake", p[8])
	}
	for _, filler := range p[9:28] {
		if filler != 0 {
			return 0, wire.Unsupported("a handshake whose filler is not zero")
		}
	}
	own := binary.LittleEndian.Uint32(p[28:])
	if own != 0 && flags&clientLongPassword != 0 {
		return 0, wire.Unsupported("MariaDB's own capability flags in a handshake of MySQL")
	}
	if stranger := own &^ allowedMariaDB; stranger != 0 {
		return 0, wire.Unsupported("MariaDB's capability flags %#x", stranger)
	}
	return flags, nil
}

// clearFlags takes the flags of clearedCapabilities out of the fixed part at the front of p.
func clearFlags(p []byte) {
	binary.LittleEndian.PutUint32(p, binary.LittleEndian.Uint32(p)&^clearedCapabilities)
}

// startTLS reads Protocol::SSLRequest. The server must have announced TLS: one that does not know it waits for the rest
// of a handshake response and would take the ClientHello, whose bytes the program chose, for it.
func (c *Client) startTLS(p []byte) error {
	flags, err := request(p)
	if err != nil {
		return err
	}
	if flags&clientSSL == 0 {
		return wire.Malformed("a handshake response of %d bytes", len(p))
	}
	if c.server.capabilities&clientSSL == 0 {
		return wire.Unsupported("TLS for a server that has not announced it")
	}
	c.request = [requestBytes]byte(p)
	c.inTLS = true
	c.statements.blind()
	return nil
}

// handshake reads Protocol::HandshakeResponse41.
func (c *Client) handshake(p []byte) error {
	if len(p) < requestBytes {
		return wire.Malformed("a handshake response of %d bytes", len(p))
	}
	flags, err := request(p)
	if err != nil {
		return err
	}
	switch {
	case c.inTLS && !bytes.Equal(p[:requestBytes], c.request[:]):
		// Some servers keep what the SSLRequest said and some what comes now.
		return wire.Unsupported("a handshake inside TLS that differs from its SSLRequest")
	case !c.inTLS && flags&clientSSL != 0:
		return wire.Unsupported("TLS asked for by a packet that is no SSLRequest")
	}
	rest := p[requestBytes:]
	_, rest, ok := cutNUL(rest, userBytesMax)
	if !ok || len(rest) == 0 || int(rest[0]) > authResponseMax || len(rest) < 1+int(rest[0]) {
		return wire.Malformed("user or password field of a handshake response")
	}
	rest = rest[1+int(rest[0]):]
	schema, rest, ok := cutNUL(rest, 255)
	if !ok {
		return wire.Malformed("schema field of a handshake response")
	}
	if !slices.Contains(c.schemas, string(schema)) {
		return wire.Unsupported("schema %q in the handshake, the peer's is %q", schema, strings.Join(c.schemas, " or "))
	}
	_, rest, ok = cutNUL(rest, 64)
	if !ok {
		return wire.Malformed("plugin field of a handshake response")
	}
	if flags&clientConnectAttrs != 0 {
		if err := attributes(rest); err != nil {
			return err
		}
	} else if len(rest) != 0 {
		return wire.Malformed("%d bytes follow a handshake response", len(rest))
	}
	c.schema = string(schema)
	c.server.deprecateEOF = flags&c.server.capabilities&clientDeprecateEOF != 0
	return nil
}

// attributes checks that the length-encoded block of key and value pairs is the rest of the packet.
func attributes(b []byte) error {
	length, b, ok := lenenc(b)
	if !ok || length != len(b) {
		return wire.Malformed("attributes of a handshake response")
	}
	fields := 0
	for ; len(b) > 0; fields++ {
		if length, b, ok = lenenc(b); !ok || length > len(b) {
			return wire.Malformed("an attribute of a handshake response")
		}
		b = b[length:]
	}
	if fields%2 != 0 {
		return wire.Malformed("an attribute of a handshake response without a value")
	}
	return nil
}

// lenenc reads an integer of one or three bytes (page "Basic Data Types"); larger ones do not fit a handshake.
func lenenc(b []byte) (value int, rest []byte, ok bool) {
	switch {
	case len(b) >= 1 && b[0] < 0xfb:
		return int(b[0]), b[1:], true
	case len(b) >= 3 && b[0] == 0xfc:
		return int(b[1]) | int(b[2])<<8, b[3:], true
	default:
		return 0, nil, false
	}
}

func cutNUL(b []byte, max int) (field, rest []byte, ok bool) {
	for i, c := range b {
		if c == 0 {
			return b[:i], b[i+1:], true
		}
		if i == max {
			break
		}
	}
	return nil, nil, false
}

// charsetAllowed tells the collations of utf8mb4, latin1 and binary. In all of them every byte below 0x80 stands for
// itself, so that no quote or backslash hides inside a character as it does in gbk, sjis or big5.
func charsetAllowed(collation byte) bool {
	switch {
	case collation == 45, collation == 46, collation >= 224 && collation <= 247, collation == 255: // utf8mb4
		return true
	case collation == 5, collation == 8, collation == 15, collation == 31, collation >= 47 && collation <= 49, collation == 94: // latin1
		return true
	default:
		return collation == 63 // binary
	}
}
