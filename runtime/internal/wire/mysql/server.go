package mysql

import (
	"bytes"
	"encoding/binary"
)

// prefixBytes is how much of a server's packet is looked at. A greeting's flags stand behind the version's name.
const prefixBytes = 192

const packetGoesOn = 1<<24 - 1 // the length of a packet whose payload goes on in the next one

// answer is what the server is expected to send.
type answer uint8

const (
	greeting answer = iota
	authenticating
	nothing // no command waits for an answer
	answerStatus
	answerReset
	answerResults
	answerPrepared
	definitions // of the columns of a result
	rows
	skipping // the rest of the answer to COM_STMT_PREPARE
	lost     // the server's packets are not understood any more
)

type eventKind uint8

const (
	eventPrepared eventKind = iota + 1
	eventRefused            // a statement was not prepared
	eventReset
	eventLost
)

type event struct {
	kind eventKind
	id   uint32
}

// server follows the server's packets far enough to know which one answers a command. What is not as expected makes
// it lost, for good.
type server struct {
	state        answer
	packets      int // of definitions or skipping: how many are still to come
	capabilities uint32
	deprecateEOF bool // in effect: announced by both sides

	head      [headerBytes]byte
	headBytes int
	left      int // bytes of payload that are still to come
	sequence  byte
	goesOn    bool // this packet continues the last one
	prefix    [prefixBytes]byte
	prefixLen int
}

// expect tells the follower that a command leaves. It fails when the last answer is not at its end.
func (s *server) expect(a answer) bool {
	if s.state != nothing || s.headBytes > 0 {
		s.state = lost
		return false
	}
	s.state, s.sequence = a, 1
	return true
}

func (s *server) follow(b []byte, tell func(event)) {
	for s.state != lost {
		if s.headBytes < headerBytes {
			n := copy(s.head[s.headBytes:], b)
			b = b[n:]
			if s.headBytes += n; s.headBytes < headerBytes {
				return
			}
			s.left, s.prefixLen = s.length(), 0
		}
		n := min(len(b), s.left)
		if !s.goesOn {
			s.prefixLen += copy(s.prefix[s.prefixLen:], b[:n])
		}
		b = b[n:]
		if s.left -= n; s.left > 0 {
			return
		}
		s.headBytes = 0
		if !s.whole(tell) {
			s.state = lost
			tell(event{kind: eventLost})
		}
		s.goesOn = s.length() == packetGoesOn
	}
}

func (s *server) length() int { return int(s.head[0]) | int(s.head[1])<<8 | int(s.head[2])<<16 }

// whole looks at a packet whose payload has come, and tells whether it was expected.
func (s *server) whole(tell func(event)) bool {
	if s.state != authenticating { // where the two sides take turns
		if s.head[headerBytes-1] != s.sequence {
			return false
		}
		s.sequence++
	}
	if s.goesOn {
		return true
	}
	p := s.prefix[:s.prefixLen]
	if len(p) == 0 {
		return false
	}
	switch s.state {
	case greeting:
		s.state = authenticating
		return s.greet(p)
	case authenticating:
		if p[0] == 0 {
			s.state = nothing
		}
		return true
	case nothing:
		return false
	}
	if p[0] == 0xff {
		if len(p) >= 3 && p[1] == 0xff && p[2] == 0xff {
			return true // MariaDB's report of progress
		}
		if s.state == answerPrepared {
			tell(event{kind: eventRefused})
		}
		s.state = nothing
		return true
	}
	return s.part(p, tell)
}

// part reads one packet of an answer that is no error.
func (s *server) part(p []byte, tell func(event)) bool {
	switch s.state {
	case answerStatus:
		s.state = nothing
		return p[0] == 0
	case answerReset:
		s.state = nothing
		if p[0] == 0 {
			tell(event{kind: eventReset})
		}
		return p[0] == 0
	case answerPrepared:
		return s.prepared(p, tell)
	case skipping:
		if s.packets--; s.packets == 0 {
			s.state = nothing
		}
		return true
	case answerResults:
		return s.result(p)
	case definitions:
		if s.packets--; s.packets > 0 {
			return true
		}
		s.state = rows
		return s.deprecateEOF || s.isEOF(p)
	case rows:
		switch {
		case !s.deprecateEOF && s.isEOF(p):
			return s.more(p[3:])
		case s.deprecateEOF && p[0] == 0xfe && s.length() < packetGoesOn:
			return s.status(p)
		}
		return true
	}
	return false
}

// isEOF tells a packet EOF (page "EOF_Packet") from a row that begins with a long value.
func (s *server) isEOF(p []byte) bool { return p[0] == 0xfe && s.length() == 5 }

// greet reads Protocol::HandshakeV10.
func (s *server) greet(p []byte) bool {
	const version = 10
	name := bytes.IndexByte(p[1:], 0)
	if p[0] != version || name < 0 {
		return false
	}
	// A number of the connection, the first part of the scramble, and a zero byte.
	p = p[1+name+1:]
	const low, high, end = 4 + 8 + 1, 4 + 8 + 1 + 2 + 1 + 2, 4 + 8 + 1 + 2 + 1 + 2 + 2
	if len(p) < end {
		return false
	}
	s.capabilities = uint32(binary.LittleEndian.Uint16(p[low:])) | uint32(binary.LittleEndian.Uint16(p[high:]))<<16
	return true
}

// prepared reads COM_STMT_PREPARE_OK: the number, then how many definitions of columns and of parameters follow.
func (s *server) prepared(p []byte, tell func(event)) bool {
	if p[0] != 0 || len(p) < 12 {
		return false
	}
	tell(event{kind: eventPrepared, id: binary.LittleEndian.Uint32(p[1:])})
	s.packets = 0
	for _, definitions := range []uint16{binary.LittleEndian.Uint16(p[5:]), binary.LittleEndian.Uint16(p[7:])} {
		s.packets += int(definitions)
		if definitions > 0 && !s.deprecateEOF {
			s.packets++
		}
	}
	s.state = nothing
	if s.packets > 0 {
		s.state = skipping
	}
	return true
}

// result reads the first packet of a result: OK, or the number of columns, behind which MariaDB may say that their
// definitions are left out.
func (s *server) result(p []byte) bool {
	if p[0] == 0 {
		return s.status(p)
	}
	columns, rest, ok := lenenc(p)
	if !ok || len(rest) > 1 || len(rest) == 1 && rest[0] > 1 {
		return false // among them the server's request for a file, 0xfb
	}
	if len(rest) == 1 && rest[0] == 0 {
		columns = 0
	}
	if s.packets = columns; !s.deprecateEOF {
		s.packets++
	}
	s.state = definitions
	if s.packets == 0 {
		s.state = rows
	}
	return true
}

// status reads OK_Packet, also as the end of rows: two integers, then the status flags.
func (s *server) status(p []byte) bool {
	p = p[1:]
	for range 2 {
		size := 1
		switch {
		case len(p) == 0:
			return false
		case p[0] == 0xfc:
			size = 3
		case p[0] == 0xfd:
			size = 4
		case p[0] == 0xfe:
			size = 9
		}
		if len(p) < size {
			return false
		}
		p = p[size:]
	}
	return s.more(p)
}

// more reads status flags: whether another result follows.
func (s *server) more(flags []byte) bool {
	const moreResults = 1 << 3
	if len(flags) < 2 {
		return false
	}
	s.state = nothing
	if flags[0]&moreResults != 0 {
		s.state = answerResults
	}
	return true
}
