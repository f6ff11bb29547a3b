package mysql

import (
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// modelServer answers commands as MySQL and MariaDB do, with rows that look like answers to COM_STMT_PREPARE.
type modelServer struct {
	dice       *rand.Rand
	deprecated bool // EOF
	next       uint32
	prepared   map[uint32]string
	said       []byte
	executed   []string // texts of statements
	sequence   byte
}

func (s *modelServer) packet(payload ...byte) {
	s.said = append(s.said, packet(s.sequence, payload...)...)
	s.sequence++
}

func (s *modelServer) eof() {
	if !s.deprecated {
		s.packet([]byte(eof)...)
	}
}

func (s *modelServer) result() {
	switch s.dice.IntN(5) {
	case 0:
		s.packet(okPacket...)
	case 1:
		s.packet([]byte(failure)...)
	default:
		for more := true; more; {
			more = s.dice.IntN(4) == 0
			s.packet(1)
			s.packet([]byte("column")...)
			s.eof()
			for range s.dice.IntN(300) * s.dice.IntN(2) {
				s.packet(preparedOK(uint32(s.dice.IntN(2+int(s.next))), uint16(s.dice.IntN(2)), 0)[headerBytes:]...)
			}
			status := byte(2)
			if more {
				status |= 1 << 3
			}
			if s.deprecated {
				s.packet(0xfe, 0, 0, status, 0, 0, 0)
			} else {
				s.packet(0xfe, 0, 0, status, 0)
			}
		}
	}
}

// cut finds a place between two packets of what was said and not yet seen, best before one with the number of a first packet.
func (s *modelServer) cut() int {
	var places []int
	for at := 0; at < len(s.said); at += headerBytes + int(s.said[at]) {
		if places = append(places, at); at > 0 && s.said[at+headerBytes-1] == 1 && s.dice.IntN(2) == 0 {
			return at
		}
	}
	if places == nil {
		return 0
	}
	return places[s.dice.IntN(len(places))]
}

// take reads one command.
func (s *modelServer) take(data []byte) {
	p := data[headerBytes:]
	s.sequence = 1
	switch p[0] {
	case comQuery:
		s.executed = append(s.executed, string(p[1:]))
		s.result()
	case comPing, comStmtReset:
		s.packet(okPacket...)
	case comResetConnection:
		s.prepared = map[uint32]string{}
		s.packet(okPacket...)
	case comStmtClose:
		delete(s.prepared, binary.LittleEndian.Uint32(p[1:]))
	case comStmtPrepare:
		s.next += 1 + uint32(s.dice.IntN(2))
		if s.dice.IntN(4) == 0 {
			s.packet([]byte(failure)...)
			return
		}
		s.prepared[s.next] = string(p[1:])
		columns, parameters := uint16(s.dice.IntN(3)), uint16(s.dice.IntN(3))
		s.packet(preparedOK(s.next, columns, parameters)[headerBytes:]...)
		for _, definitions := range []uint16{parameters, columns} {
			for range definitions {
				s.packet([]byte("definition")...)
			}
			if definitions > 0 {
				s.eof()
			}
		}
	case comStmtExecute:
		text, found := s.prepared[binary.LittleEndian.Uint32(p[1:])]
		if !found {
			s.packet([]byte(failure)...)
			return
		}
		s.executed = append(s.executed, text)
		s.result()
	}
}

// Whatever a program sends and however slowly it lets the server speak, what the server executes was judged as what it is.
func TestWhatAServerExecutesWasJudged(t *testing.T) {
	const seeds = 1000
	verbs := map[string]string{
		"SELECT a FROM t": "select", "SELECT b FROM t": "select", "DELETE FROM t": "delete", "INSERT INTO t (a) VALUES (1)": "insert",
	}
	texts := []string{"SELECT a FROM t", "SELECT b FROM t", "DELETE FROM t", "INSERT INTO t (a) VALUES (1)"}
	fromPrepared, blinded := 0, 0
	for seed := range uint64(seeds) {
		dice := rand.New(rand.NewPCG(seed, 2))
		s := &modelServer{dice: dice, deprecated: dice.IntN(2) == 0, prepared: map[uint32]string{}}
		c := logged(t)
		c.server.deprecateEOF = s.deprecated
		inTLS, hasty := dice.IntN(4) == 0, dice.IntN(2) == 0
		if inTLS {
			c = blind(t)
		}
		var judged []string
		for range 80 {
			n := len(s.said)
			if hasty && dice.IntN(8) == 0 {
				n = s.cut()
			}
			c.Server(s.said[:n])
			s.said = s.said[n:]
			text, id := texts[dice.IntN(len(texts))], uint32(dice.IntN(1+int(s.next)))
			for _, known := range slices.Sorted(maps.Keys(s.prepared)) {
				if dice.IntN(3) == 0 {
					id = known
				}
			}
			data := [][]byte{
				query(text), prepareOf(text), prepareOf(text), executeOf(id), executeOf(id), executeOf(id), numbered(comStmtClose, id), numbered(comStmtReset, id),
				packet(0, comPing), packet(0, comResetConnection),
			}[dice.IntN(10)]
			taken, u, err := c.Next(data)
			if err != nil {
				c.refused = nil // the attacker knows the rules
				continue
			}
			if u.Kind == Message {
				judged = append(judged, u.Verb)
			}
			before := len(s.executed)
			s.take(data[:taken])
			if data[headerBytes] == comStmtExecute && len(s.executed) == before {
				judged = judged[:len(judged)-1] // the server did not know the number
			} else if data[headerBytes] == comStmtExecute {
				fromPrepared++
			}
			if u.Kind == Message && len(s.executed) > before && verbs[s.executed[before]] != u.Verb {
				t.Fatalf("seed %d: %q was executed and judged as %s", seed, s.executed[before], u.Verb)
			}
		}
		if len(judged) != len(s.executed) {
			t.Fatalf("seed %d: judged %d, executed %d", seed, len(judged), len(s.executed))
		}
		if !inTLS && c.statements.isBlind {
			blinded++
		}
	}
	if fromPrepared < 3*seeds || blinded == 0 || blinded > seeds/2 {
		t.Errorf("%d executes of prepared statements, %d of %d were not followed: the test tries too little", fromPrepared, blinded, seeds)
	}
}
