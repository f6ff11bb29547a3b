// Package mysql reads what a client sends over the MySQL protocol: the connection phase and then commands. Page names
// are those of the MySQL developer documentation ("Client/Server Protocol").
package mysql

import (
	"encoding/binary"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/sql"
)

// Bounds of the client's side.
const (
	PacketBytesMax = 1 << 20 // payload; beyond it nothing is held, so nothing could be judged
	headerBytes    = 4

	handshakeBytesMax  = 4096
	authPacketsMax     = 4 // an auth switch, a public key request, an encrypted password, and one to spare
	authPacketBytesMax = 1024
	userBytesMax       = 128
	authResponseMax    = 250 // one length byte, whichever of the two encodings the server uses
)

// Capability flags (page "Capabilities Flags").
const (
	clientLongPassword    = 1 << 0
	clientFoundRows       = 1 << 1
	clientLongFlag        = 1 << 2
	clientConnectWithDB   = 1 << 3
	clientODBC            = 1 << 6
	clientIgnoreSpace     = 1 << 8
	clientProtocol41      = 1 << 9
	clientInteractive     = 1 << 10
	clientSSL             = 1 << 11
	clientIgnoreSIGPIPE   = 1 << 12
	clientTransactions    = 1 << 13
	clientReserved        = 1 << 14
	clientSecure          = 1 << 15
	clientMultiResults    = 1 << 17
	clientPSMultiResults  = 1 << 18
	clientPluginAuth      = 1 << 19
	clientConnectAttrs    = 1 << 20
	clientLenencAuth      = 1 << 21
	clientExpiredPassword = 1 << 22
	clientSessionTrack    = 1 << 23
	clientDeprecateEOF    = 1 << 24

	// Without these the packet has other fields, or the connection another schema.
	requiredCapabilities = clientConnectWithDB | clientProtocol41 | clientSecure | clientPluginAuth

	// A closed list. Left out, beside what changes the transport (SSL, COMPRESS, ZSTD): LOCAL_FILES lets the server ask
	// for files, MULTI_STATEMENTS puts two messages into one packet, OPTIONAL_RESULTSET_METADATA and QUERY_ATTRIBUTES
	// change what a command looks like, IGNORE_SPACE changes the lexer.
	allowedCapabilities = requiredCapabilities | clientLongPassword | clientFoundRows | clientLongFlag | clientODBC |
		clientInteractive | clientIgnoreSIGPIPE | clientTransactions | clientReserved | clientMultiResults |
		clientPSMultiResults | clientConnectAttrs | clientLenencAuth | clientExpiredPassword | clientSessionTrack |
		clientDeprecateEOF
)

// Commands (page "Command Phase").
const (
	comQuit            = 0x01
	comQuery           = 0x03
	comPing            = 0x0e
	comResetConnection = 0x1f
)

// commandNames is for people who read a refusal.
var commandNames = map[byte]string{
	0x00: "COM_SLEEP", 0x02: "COM_INIT_DB", 0x04: "COM_FIELD_LIST", 0x05: "COM_CREATE_DB", 0x06: "COM_DROP_DB",
	0x07: "COM_REFRESH", 0x08: "COM_SHUTDOWN", 0x09: "COM_STATISTICS", 0x0a: "COM_PROCESS_INFO",
	0x0c: "COM_PROCESS_KILL", 0x0d: "COM_DEBUG", 0x11: "COM_CHANGE_USER", 0x12: "COM_BINLOG_DUMP",
	0x16: "COM_STMT_PREPARE", 0x17: "COM_STMT_EXECUTE", 0x18: "COM_STMT_SEND_LONG_DATA", 0x19: "COM_STMT_CLOSE",
	0x1a: "COM_STMT_RESET", 0x1b: "COM_SET_OPTION", 0x1c: "COM_STMT_FETCH", 0xfe: "COM_MULTI",
}

// Unit is one packet of the client.
type Unit struct {
	Support bool   // handshake or upkeep: judged here, never a step of the function CFG
	Prepare bool   // always false: prepared statements are refused, see commandPacket
	Text    string // normalised, never payload
	Verb    string // in the spelling of the compiled policy; "" when Support
	Read    []string
	Write   []string
}

// Client follows the client's side of one connection. It sees nothing of the server's side, so it never relies on
// what the server said.
type Client struct {
	schema      string
	phase       phase
	authPackets int
	sequence    byte // of the last packet in the connection phase
	refused     error
}

type phase uint8

const (
	inHandshake phase = iota
	inAuthentication
	inCommands
	afterQuit
)

// NewClient begins a connection to a peer whose schema is schema; the client must name it in its handshake.
func NewClient(schema string) *Client { return &Client{schema: schema} }

// Next reads the packet at the front of b; n counts its bytes, the header included. After an error other than
// wire.ErrShort the connection cannot be followed any more and every call returns that error.
func (c *Client) Next(b []byte) (n int, u Unit, err error) {
	if c.refused != nil {
		return 0, Unit{}, c.refused
	}
	n, u, err = c.next(b)
	if err != nil && err != wire.ErrShort {
		c.refused = err
	}
	return n, u, err
}

func (c *Client) next(b []byte) (int, Unit, error) {
	if c.phase == afterQuit {
		return 0, Unit{}, wire.Malformed("bytes after COM_QUIT")
	}
	if len(b) < headerBytes {
		return 0, Unit{}, wire.ErrShort
	}
	length := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
	if length > PacketBytesMax {
		return 0, Unit{}, wire.TooLarge("a packet of %d bytes, at most %d", length, PacketBytesMax)
	}
	if length == 0 && c.phase != inAuthentication {
		return 0, Unit{}, wire.Malformed("an empty packet")
	}
	sequence := b[3]
	bound := PacketBytesMax
	switch c.phase {
	case inHandshake:
		// The server's greeting has sequence id 0.
		if sequence != 1 {
			return 0, Unit{}, wire.Malformed("sequence id %d of a handshake response", sequence)
		}
		bound = handshakeBytesMax
	case inAuthentication:
		// A command begins a new count at 0, so the two phases cannot be taken for each other by either side.
		if sequence == 0 {
			c.phase = inCommands
			break
		}
		// The server answers each packet with one of its own.
		if sequence != c.sequence+2 {
			return 0, Unit{}, wire.Malformed("sequence id %d after %d while authenticating", sequence, c.sequence)
		}
		bound = authPacketBytesMax
	case inCommands:
		if sequence != 0 {
			return 0, Unit{}, wire.Malformed("sequence id %d of a command", sequence)
		}
	}
	if c.phase == inCommands && length == 0 {
		return 0, Unit{}, wire.Malformed("an empty packet")
	}
	if length > bound {
		return 0, Unit{}, wire.TooLarge("a packet of %d bytes while connecting, at most %d", length, bound)
	}
	if len(b) < headerBytes+length {
		return 0, Unit{}, wire.ErrShort
	}
	payload := b[headerBytes : headerBytes+length]
	n := headerBytes + length
	switch c.phase {
	case inHandshake:
		if err := c.handshake(payload); err != nil {
			return 0, Unit{}, err
		}
		c.phase, c.sequence = inAuthentication, sequence
		return n, Unit{Support: true, Text: "mysql handshake " + policy.Printable(c.schema, 64)}, nil
	case inAuthentication:
		if c.authPackets == authPacketsMax {
			return 0, Unit{}, wire.Malformed("more than %d packets while authenticating", authPacketsMax)
		}
		c.authPackets++
		c.sequence = sequence
		return n, Unit{Support: true, Text: "mysql authentication"}, nil
	default:
		u, err := c.command(payload)
		if err != nil {
			return 0, Unit{}, err
		}
		return n, u, nil
	}
}

// handshake reads Protocol::HandshakeResponse41.
func (c *Client) handshake(p []byte) error {
	if len(p) < 32 {
		return wire.Malformed("a handshake response of %d bytes", len(p))
	}
	flags := binary.LittleEndian.Uint32(p)
	if flags&clientSSL != 0 {
		return wire.Unsupported("TLS inside the MySQL protocol")
	}
	if stranger := flags &^ allowedCapabilities; stranger != 0 {
		return wire.Unsupported("capability flags %#x", stranger)
	}
	if missing := requiredCapabilities &^ flags; missing != 0 {
		return wire.Unsupported("a handshake without capability flags %#x", missing)
	}
	if !charsetAllowed(p[8]) {
		return wire.Unsupported("collation %d in the handshake", p[8])
	}
	// MariaDB puts its own capability flags into the last four of the 23 filler bytes.
	for _, filler := range p[9:32] {
		if filler != 0 {
			return wire.Unsupported("a handshake with MariaDB's own capability flags")
		}
	}
	rest := p[32:]
	_, rest, ok := cutNUL(rest, userBytesMax)
	if !ok || len(rest) == 0 || int(rest[0]) > authResponseMax || len(rest) < 1+int(rest[0]) {
		return wire.Malformed("user or password field of a handshake response")
	}
	rest = rest[1+int(rest[0]):]
	schema, rest, ok := cutNUL(rest, 255)
	if !ok {
		return wire.Malformed("schema field of a handshake response")
	}
	if string(schema) != c.schema {
		return wire.Unsupported("schema %q in the handshake, the peer's is %q", schema, c.schema)
	}
	_, rest, ok = cutNUL(rest, 64)
	if !ok {
		return wire.Malformed("plugin field of a handshake response")
	}
	if flags&clientConnectAttrs == 0 {
		if len(rest) != 0 {
			return wire.Malformed("%d bytes follow a handshake response", len(rest))
		}
		return nil
	}
	return attributes(rest)
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

// command reads one packet of the command phase. Prepared statements are refused: COM_STMT_EXECUTE names its
// statement by a number that only the server's answer tells.
func (c *Client) command(p []byte) (Unit, error) {
	switch p[0] {
	case comQuery:
		statement, err := sql.Classify(p[1:], c.schema)
		if err != nil {
			return Unit{}, err
		}
		return Unit{Support: statement.Support, Text: statement.Text, Verb: statement.Verb, Read: statement.Read, Write: statement.Write}, nil
	case comPing, comResetConnection, comQuit:
		if len(p) != 1 {
			return Unit{}, wire.Malformed("%d bytes follow a command without parameters", len(p)-1)
		}
		switch p[0] {
		case comPing:
			return Unit{Support: true, Text: "mysql ping"}, nil
		case comResetConnection:
			return Unit{Support: true, Text: "mysql reset connection"}, nil
		}
		c.phase = afterQuit
		return Unit{Support: true, Text: "mysql quit"}, nil
	default:
		if name, known := commandNames[p[0]]; known {
			return Unit{}, wire.Unsupported("%s", name)
		}
		return Unit{}, wire.Unsupported("command %#02x", p[0])
	}
}
