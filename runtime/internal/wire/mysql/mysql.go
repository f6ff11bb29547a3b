// Package mysql reads what a client sends over the MySQL protocol: the connection phase, in clear or inside TLS, and then
// commands, prepared statements among them. Page names are those of the MySQL developer documentation ("Client/Server
// Protocol").
//
// # Prepared statements
//
// COM_STMT_EXECUTE names its statement by a number that the server chose, so Server follows the server's packets in
// clear and learns the number from the answer. Inside TLS Server is not called, and what it would see there could not
// be trusted: in TLS 1.3 nothing ties the server's secret that a program logs to the connection. Then, and when the
// answers cannot be followed, an execute is only accepted as long as all statements that were prepared since the beginning,
// or since COM_RESET_CONNECTION, are the same message: whichever of them the number means, it is judged as what it is.
// COM_STMT_CLOSE does not take a statement out of that account. A program could close a number that does not exist,
// prepare a second statement, and execute the first one under its name; counting along does not help either, since
// MariaDB does not begin at one for each connection. That COM_RESET_CONNECTION closes all holds from MySQL 5.7.3 and MariaDB 10.2.4.
//
// # Bounds
//
// A Client keeps no bytes of packets, except the first prefixBytes of the server's. It keeps at most statementsMax
// numbers with statementNamesMax bytes of names: about 100 KiB, of which a connection without prepared statements uses less
// than 1 KiB.
package mysql

import (
	"slices"

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
	statementsMax      = 256
	statementNamesMax  = 32 << 10
	longDataMax        = PacketBytesMax // between two executes: it leaves before a message is judged
)

// Commands (page "Command Phase").
const (
	comQuit             = 0x01
	comQuery            = 0x03
	comPing             = 0x0e
	comStmtPrepare      = 0x16
	comStmtExecute      = 0x17
	comStmtSendLongData = 0x18
	comStmtClose        = 0x19
	comStmtReset        = 0x1a
	comResetConnection  = 0x1f
)

// commandNames is for people who read a refusal.
var commandNames = map[byte]string{
	0x00: "COM_SLEEP", 0x02: "COM_INIT_DB", 0x04: "COM_FIELD_LIST", 0x05: "COM_CREATE_DB", 0x06: "COM_DROP_DB",
	0x07: "COM_REFRESH", 0x08: "COM_SHUTDOWN", 0x09: "COM_STATISTICS", 0x0a: "COM_PROCESS_INFO",
	0x0c: "COM_PROCESS_KILL", 0x0d: "COM_DEBUG", 0x11: "COM_CHANGE_USER", 0x12: "COM_BINLOG_DUMP",
	0x1b: "COM_SET_OPTION", 0x1c: "COM_STMT_FETCH", 0xfa: "COM_STMT_BULK_EXECUTE", 0xfe: "COM_MULTI",
}

// Kind tells what a unit is. The zero kind is no unit at all.
type Kind uint8

// Kinds of units.
const (
	Support  Kind = iota + 1 // handshake or upkeep: judged here, never a step of the function CFG
	Message                  // a statement: COM_QUERY or COM_STMT_EXECUTE
	Prepare                  // a statement that is not executed yet: the function's CFG has to hold it somewhere
	StartTLS                 // an SSLRequest: what follows is TLS, and Next goes on inside
)

// Unit is one packet of the client.
type Unit struct {
	Kind  Kind
	Text  string   // normalised, never payload
	Verb  string   // of Message and Prepare, in the spelling of the compiled policy
	Read  []string // as sql.Statement
	Write []string
}

// Client follows the client's side of one connection. Its methods must not be called at the same time.
type Client struct {
	schemas []string // of the peers at the address
	schema  string   // which the handshake named

	phase       phase
	inTLS       bool
	request     [requestBytes]byte // the SSLRequest
	authPackets int
	sequence    byte // of the last packet in the connection phase
	refused     error

	server     server
	statements statements
}

type phase uint8

const (
	inHandshake phase = iota
	inAuthentication
	inCommands
	afterQuit
)

// NewClient begins a connection to a peer. The client must name one of schemas, its peers' at that address, in its
// handshake.
func NewClient(schemas ...string) *Client { return &Client{schemas: schemas} }

// Schema is the schema that the handshake named, "" before.
func (c *Client) Schema() string { return c.schema }

// InTLS tells that an SSLRequest has passed: what the client sends after it is TLS, and Next is for what is inside.
func (c *Client) InTLS() bool { return c.inTLS }

// Server takes what the server sends in clear, in order and in any pieces, before the client sees it. It must not be
// called with what comes inside TLS.
func (c *Client) Server(b []byte) {
	if !c.inTLS {
		c.server.follow(b, c.statements.answered)
	}
}

// Next reads the packet at the front of b; n counts its bytes, the header included. In an SSLRequest and a handshake
// response it clears, in b itself, the flags that the server must not see (clearedCapabilities). After an error other
// than wire.ErrShort the connection cannot be followed any more and every call returns that error.
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
	bound, err := c.header(length, b[3])
	if err != nil {
		return 0, Unit{}, err
	}
	if length > bound {
		return 0, Unit{}, wire.TooLarge("a packet of %d bytes, at most %d", length, bound)
	}
	n := headerBytes + length
	if len(b) < n {
		return 0, Unit{}, wire.ErrShort
	}
	u, err := c.packet(b[headerBytes:n])
	if err != nil {
		return 0, Unit{}, err
	}
	return n, u, nil
}

// header checks a packet's length and sequence id and tells how long a packet may be in this phase.
func (c *Client) header(length int, sequence byte) (bound int, err error) {
	if length > PacketBytesMax {
		return PacketBytesMax, nil
	}
	if length == 0 && (c.phase != inAuthentication || sequence == 0) {
		return 0, wire.Malformed("an empty packet")
	}
	switch c.phase {
	case inHandshake:
		// The server's greeting has sequence id 0; an SSLRequest has no answer in packets.
		want := byte(1)
		if c.inTLS {
			want = 2
		}
		if sequence != want {
			return 0, wire.Malformed("sequence id %d of a handshake response", sequence)
		}
		c.sequence = sequence
		return handshakeBytesMax, nil
	case inAuthentication:
		// A command begins a new count at 0, so the two phases cannot be taken for each other by either side.
		if sequence == 0 {
			c.phase = inCommands
			return PacketBytesMax, nil
		}
		// The server answers each packet with one of its own. A packet that is asked for again has been looked at already.
		if sequence != c.sequence+2 {
			return 0, wire.Malformed("sequence id %d after %d while authenticating", sequence, c.sequence)
		}
		return authPacketBytesMax, nil
	default:
		if sequence != 0 {
			return 0, wire.Malformed("sequence id %d of a command", sequence)
		}
		return PacketBytesMax, nil
	}
}

// packet reads the payload of a whole packet.
func (c *Client) packet(p []byte) (Unit, error) {
	switch c.phase {
	case inHandshake:
		if len(p) == requestBytes && !c.inTLS {
			if err := c.startTLS(p); err != nil {
				return Unit{}, err
			}
			clearFlags(p)
			return Unit{Kind: StartTLS, Text: "mysql start tls"}, nil
		}
		if err := c.handshake(p); err != nil {
			return Unit{}, err
		}
		clearFlags(p)
		c.phase = inAuthentication
		return Unit{Kind: Support, Text: "mysql handshake " + policy.Printable(c.schema, 64)}, nil
	case inAuthentication:
		if c.authPackets == authPacketsMax {
			return Unit{}, wire.Malformed("more than %d packets while authenticating", authPacketsMax)
		}
		c.authPackets++
		c.sequence += 2
		return Unit{Kind: Support, Text: "mysql authentication"}, nil
	default:
		return c.command(p)
	}
}

// command reads one packet of the command phase.
func (c *Client) command(p []byte) (Unit, error) {
	if c.statements.asked != nil && p[0] != comQuit {
		return Unit{}, wire.Unsupported("a command before the answer to COM_STMT_PREPARE")
	}
	switch p[0] {
	case comQuery:
		statement, err := sql.Classify(p[1:], c.schema)
		if err != nil {
			return Unit{}, err
		}
		c.expect(answerResults)
		if statement.Support {
			return Unit{Kind: Support, Text: statement.Text}, nil
		}
		return unitOf(Message, &statement), nil
	case comStmtPrepare:
		return c.prepare(p[1:])
	case comStmtExecute:
		return c.execute(p[1:])
	case comStmtSendLongData, comStmtClose, comStmtReset:
		return c.upkeep(p)
	case comPing, comResetConnection, comQuit:
		if len(p) != 1 {
			return Unit{}, wire.Malformed("%d bytes follow a command without parameters", len(p)-1)
		}
		switch p[0] {
		case comPing:
			c.expect(answerStatus)
			return Unit{Kind: Support, Text: "mysql ping"}, nil
		case comResetConnection:
			c.expect(answerReset)
			c.statements.reset()
			return Unit{Kind: Support, Text: "mysql reset connection"}, nil
		}
		c.phase = afterQuit
		return Unit{Kind: Support, Text: "mysql quit"}, nil
	default:
		if name, known := commandNames[p[0]]; known {
			return Unit{}, wire.Unsupported("%s", name)
		}
		return Unit{}, wire.Unsupported("command %#02x", p[0])
	}
}

// expect says which answer comes next. A command before the end of the last answer is allowed, but from then on it is
// not known which packet answers what.
func (c *Client) expect(a answer) {
	if !c.server.expect(a) {
		c.statements.blind()
	}
}

func unitOf(kind Kind, s *sql.Statement) Unit {
	u := Unit{Kind: kind, Text: s.Text, Verb: s.Verb, Read: slices.Clone(s.Read), Write: slices.Clone(s.Write)}
	if kind == Prepare {
		u.Text = "mysql prepare" + s.Text[len("mysql"):]
	}
	return u
}
