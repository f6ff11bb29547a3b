package mysql

import (
	"encoding/binary"
	"slices"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/sql"
)

// statements are the prepared ones of a connection; the package documentation says when they are known by number.
type statements struct {
	asked    *sql.Statement // prepared, and the server has not answered
	known    map[uint32]*sql.Statement
	names    int // bytes of names in known
	isBlind  bool
	only     *sql.Statement // when blind: what all of them are
	isMixed  bool           // when blind: they are not all the same message
	longData int            // bytes since the last execute
}

// last is MariaDB's number for the statement that was prepared last. It is refused: for other servers it is a number
// like all others, and whether the last one could be prepared is not known inside TLS.
const last = 0xffffffff

// blind forgets numbers: the answers are not followed any more.
func (s *statements) blind() {
	if s.isBlind {
		return
	}
	s.isBlind = true
	for _, statement := range s.known {
		s.add(statement)
	}
	if s.asked != nil {
		s.add(s.asked)
	}
	s.known, s.asked, s.names = nil, nil, 0
}

// add counts a statement in while numbers are not known.
func (s *statements) add(statement *sql.Statement) {
	if s.only == nil {
		s.only = statement
	}
	s.isMixed = s.isMixed || s.only.Verb != statement.Verb || !slices.Equal(s.only.Read, statement.Read) || !slices.Equal(s.only.Write, statement.Write)
}

// answered takes what the server's packets have told.
func (s *statements) answered(e event) {
	switch e.kind {
	case eventPrepared:
		if s.asked != nil {
			s.forget(e.id)
			if s.known == nil {
				s.known = map[uint32]*sql.Statement{}
			}
			s.known[e.id] = s.asked
			s.names += namesOf(s.asked)
		}
		s.asked = nil
	case eventRefused:
		s.asked = nil
	case eventReset:
		s.known, s.names = nil, 0
	case eventLost:
		s.blind()
	}
}

// reset is COM_RESET_CONNECTION. Where answers are followed, the server's counts.
func (s *statements) reset() {
	if s.isBlind {
		s.only, s.isMixed = nil, false
	}
}

func (s *statements) forget(id uint32) {
	if statement := s.known[id]; statement != nil {
		s.names -= namesOf(statement)
		delete(s.known, id)
	}
}

// find returns the statement that id names.
func (s *statements) find(id uint32) (*sql.Statement, error) {
	switch {
	case id == last:
		return nil, wire.Unsupported("the statement that was prepared last, by MariaDB's number for it")
	case !s.isBlind && s.known[id] != nil:
		return s.known[id], nil
	case s.isBlind && s.isMixed:
		return nil, wire.Unsupported("a prepared statement by its number, where several are prepared and the server's answers are not seen")
	case s.isBlind && s.only != nil:
		return s.only, nil
	}
	return nil, wire.Malformed("the number of a statement that was not prepared")
}

func namesOf(s *sql.Statement) int {
	bytes := 0
	for _, names := range [][]string{s.Read, s.Write} {
		for _, name := range names {
			bytes += len(name)
		}
	}
	return bytes
}

// prepare reads COM_STMT_PREPARE.
func (c *Client) prepare(text []byte) (Unit, error) {
	statement, err := sql.ClassifyPrepared(text, c.schema)
	if err != nil {
		return Unit{}, err
	}
	if statement.Support {
		return Unit{}, wire.Unsupported("a prepared statement that is none of a policy")
	}
	s := &c.statements
	if len(s.known) == statementsMax || s.names+namesOf(&statement) > statementNamesMax {
		return Unit{}, wire.TooLarge("more than %d prepared statements, or %d bytes of names in them", statementsMax, statementNamesMax)
	}
	c.expect(answerPrepared)
	if s.isBlind {
		s.add(&statement)
	} else {
		s.asked = &statement
	}
	return unitOf(Prepare, &statement), nil
}

// execute reads COM_STMT_EXECUTE: a number, the kind of cursor, an iteration count, and then parameters, whose values no
// verdict depends on.
func (c *Client) execute(p []byte) (Unit, error) {
	if len(p) < 9 {
		return Unit{}, wire.Malformed("COM_STMT_EXECUTE of %d bytes", 1+len(p))
	}
	if p[4] != 0 {
		return Unit{}, wire.Unsupported("COM_STMT_EXECUTE with a cursor or attributes, flags %#02x", p[4])
	}
	if count := binary.LittleEndian.Uint32(p[5:]); count != 1 {
		return Unit{}, wire.Malformed("COM_STMT_EXECUTE with %d iterations", count)
	}
	statement, err := c.statements.find(binary.LittleEndian.Uint32(p))
	if err != nil {
		return Unit{}, err
	}
	c.expect(answerResults)
	c.statements.longData = 0
	return unitOf(Message, statement), nil
}

// upkeep reads the commands that go with prepared statements.
func (c *Client) upkeep(p []byte) (Unit, error) {
	if len(p) < 5 {
		return Unit{}, wire.Malformed("a command of %d bytes for a prepared statement", len(p))
	}
	id := binary.LittleEndian.Uint32(p[1:])
	switch s := &c.statements; {
	case id == last:
		return Unit{}, wire.Unsupported("the statement that was prepared last, by MariaDB's number for it")
	case p[0] == comStmtClose: // clients also close what a reset has closed
	case s.isBlind && s.only == nil, !s.isBlind && s.known[id] == nil:
		return Unit{}, wire.Malformed("the number of a statement that was not prepared")
	}
	if p[0] == comStmtSendLongData {
		if len(p) < 7 {
			return Unit{}, wire.Malformed("COM_STMT_SEND_LONG_DATA of %d bytes", len(p))
		}
		if c.statements.longData += len(p); c.statements.longData > longDataMax {
			return Unit{}, wire.TooLarge("more than %d bytes of COM_STMT_SEND_LONG_DATA before an execute", longDataMax)
		}
		return Unit{Kind: Support, Text: "mysql long data"}, nil
	}
	if len(p) != 5 {
		return Unit{}, wire.Malformed("%d bytes follow the number of a statement", len(p)-5)
	}
	if p[0] == comStmtReset {
		c.expect(answerStatus)
		return Unit{Kind: Support, Text: "mysql reset statement"}, nil
	}
	c.statements.forget(id)
	return Unit{Kind: Support, Text: "mysql close statement"}, nil
}
