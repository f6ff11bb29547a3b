package mysql

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// greetingOf is a server's first packet with capabilities.
func greetingOf(capabilities uint32) []byte {
	p := append([]byte{10}, "5.5.5-10.11.19-MariaDB\x00"...)
	p = append(p, make([]byte, 13)...)
	p = binary.LittleEndian.AppendUint16(p, uint16(capabilities))
	p = append(p, 45, 2, 0)
	p = binary.LittleEndian.AppendUint16(p, uint16(capabilities>>16))
	return packet(0, append(p, make([]byte, 11)...)...)
}

// logged is a client behind its authentication, whose server was seen.
func logged(t testing.TB) *Client {
	t.Helper()
	c := NewClient("helloRetail")
	c.Server(greetingOf(clientSSL | clientDeprecateEOF))
	take(t, c, of(nil).build())
	c.Server(packet(2, okPacket...))
	return c
}

// blind is a client inside TLS.
func blind(t testing.TB) *Client {
	t.Helper()
	c := NewClient("helloRetail")
	c.Server(greetingOf(clientSSL))
	whole := of(func(r *response) { r.flags |= clientSSL }).build()
	take(t, c, packet(1, whole[headerBytes:headerBytes+requestBytes]...))
	whole[headerBytes-1] = 2
	take(t, c, whole)
	return c
}

func take(t testing.TB, c *Client, data []byte) Unit {
	t.Helper()
	n, u, err := c.Next(data)
	if err != nil || n != len(data) {
		t.Fatalf("%x: %d bytes, %v", data, n, err)
	}
	return u
}

func refuse(t testing.TB, c *Client, data []byte, reason policy.Reason) {
	t.Helper()
	n, u, err := c.Next(data)
	var refused *wire.Error
	if n != 0 || !errors.As(err, &refused) || refused.Reason != reason {
		t.Errorf("%x: %d bytes, %#v, %v; want %s", data[:min(len(data), 40)], n, u, err, reason)
	}
}

var okPacket = []byte{0, 0, 0, 2, 0, 0, 0}

func prepareOf(text string) []byte { return packet(0, append([]byte{comStmtPrepare}, text...)...) }

func preparedOK(id uint32, columns, parameters uint16) []byte {
	p := binary.LittleEndian.AppendUint32([]byte{0}, id)
	p = binary.LittleEndian.AppendUint16(p, columns)
	p = binary.LittleEndian.AppendUint16(p, parameters)
	return packet(1, append(p, 0, 0, 0)...)
}

func numbered(command byte, id uint32, rest ...byte) []byte {
	return packet(0, append(binary.LittleEndian.AppendUint32([]byte{command}, id), rest...)...)
}

func executeOf(id uint32) []byte { return numbered(comStmtExecute, id, 0, 1, 0, 0, 0) }

const (
	eof     = "\xfe\x00\x00\x02\x00"
	failure = "\xff\x15\x04#28000no"
)

// answers is a server's packets, numbered from 1 on.
func answers(payloads ...string) []byte {
	var all []byte
	for i, payload := range payloads {
		all = append(all, packet(byte(i+1), []byte(payload)...)...)
	}
	return all
}

func TestAnExecuteIsTheStatementThatItsNumberNames(t *testing.T) {
	c := logged(t)
	prepared := take(t, c, prepareOf("SELECT a FROM t WHERE b = ? LIMIT ?"))
	c.Server(slices.Concat(preparedOK(7, 1, 2), packet(2, 'p'), packet(3, 'p'), packet(4, []byte(eof)...), packet(5, 'c'), packet(6, []byte(eof)...)))
	take(t, c, prepareOf("DELETE FROM u WHERE a = ?"))
	c.Server(slices.Concat(preparedOK(9, 0, 1), packet(2, 'p'), packet(3, []byte(eof)...)))

	first := take(t, c, executeOf(9))
	c.Server(answers(string(okPacket)))
	second := take(t, c, executeOf(7))

	if prepared.Kind != Prepare || prepared.Verb != "select" || !slices.Equal(prepared.Read, []string{"t"}) || prepared.Text != "mysql prepare select read t" {
		t.Errorf("%#v", prepared)
	}
	if first.Kind != Message || first.Verb != "delete" || !slices.Equal(first.Write, []string{"u"}) || second.Verb != "select" || second.Text != "mysql select read t" {
		t.Errorf("%#v, %#v", first, second)
	}
}

func TestANumberThatIsNotKnownIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		before func(t *testing.T, c *Client)
		reason policy.Reason
	}{
		"never prepared":    {func(*testing.T, *Client) {}, policy.ReasonMalformed},
		"not prepared":      {func(t *testing.T, c *Client) { take(t, c, prepareOf("SELECT a FROM t")); c.Server(answers(failure)) }, policy.ReasonMalformed},
		"another number":    {func(t *testing.T, c *Client) { take(t, c, prepareOf("SELECT a FROM t")); c.Server(preparedOK(2, 0, 0)) }, policy.ReasonMalformed},
		"before the answer": {func(t *testing.T, c *Client) { take(t, c, prepareOf("SELECT a FROM t")) }, policy.ReasonUnsupported},
		"half of the answer": {func(t *testing.T, c *Client) {
			take(t, c, prepareOf("SELECT a FROM t"))
			c.Server(preparedOK(1, 0, 0)[:10])
		}, policy.ReasonUnsupported},
		"closed": {func(t *testing.T, c *Client) {
			take(t, c, prepareOf("SELECT a FROM t"))
			c.Server(preparedOK(1, 0, 0))
			take(t, c, numbered(comStmtClose, 1))
		}, policy.ReasonMalformed},
		"behind a reset": {func(t *testing.T, c *Client) {
			take(t, c, prepareOf("SELECT a FROM t"))
			c.Server(preparedOK(1, 0, 0))
			take(t, c, packet(0, comResetConnection))
			c.Server(answers(string(okPacket)))
		}, policy.ReasonMalformed},
	} {
		client := logged(t)
		c.before(t, client)
		t.Run(name, func(t *testing.T) { refuse(t, client, executeOf(1), c.reason) })
	}
}

// A row that looks like the answer to a prepare would give a number of the program's choice to another statement.
func TestARowIsNotTakenForTheAnswerToAPrepare(t *testing.T) {
	row := string(preparedOK(1, 0, 0)[headerBytes:])
	c := logged(t)
	take(t, c, prepareOf("SELECT a FROM t"))
	c.Server(preparedOK(1, 0, 0))
	take(t, c, query("SELECT a FROM t"))
	c.Server(answers("\x01", "column", eof))
	take(t, c, prepareOf("DELETE FROM u")) // while rows are still to come

	c.Server(packet(4, []byte(row)...))

	refuse(t, c, executeOf(1), policy.ReasonUnsupported)
}

func TestAnswersAreFollowedToTheirEnd(t *testing.T) {
	for name, c := range map[string]struct {
		command      []byte
		deprecateEOF bool
		answer       []byte
	}{
		"ok":                                {query("DELETE FROM t"), false, answers(string(okPacket))},
		"an error":                          {query("DELETE FROM t"), false, answers(failure)},
		"a result":                          {query("SELECT a FROM t"), false, answers("\x01", "column", eof, "row", "\xfe12345678", eof)},
		"a result without rows":             {query("SELECT a FROM t"), false, answers("\x01", "column", eof, eof)},
		"an error among rows":               {query("SELECT a FROM t"), false, answers("\x01", "column", eof, "row", failure)},
		"without EOF":                       {query("SELECT a FROM t"), true, answers("\x02", "column", "column", "row", "\xfe\x00\x00\x02\x00\x00\x00")},
		"two results":                       {query("SELECT a FROM t"), false, answers("\x01", "column", eof, "row", "\xfe\x00\x00\x0a\x00", "\x01", "column", eof, eof)},
		"two results without EOF":           {query("SELECT a FROM t"), true, answers("\x01", "column", "\xfe\x00\x00\x0a\x00\x00\x00", string(okPacket))},
		"ok with long numbers":              {query("DELETE FROM t"), false, answers("\x00\xfe12345678\xfd123\x02\x00\x00\x00")},
		"more than 250 columns":             {query("SELECT a FROM t"), true, answers(append(append([]string{"\xfc\x2c\x01"}, slices.Repeat([]string{"column"}, 300)...), "\xfe\x00\x00\x02\x00\x00\x00")...)},
		"definitions are left out":          {executeOf(1), false, answers("\x01\x00", eof, "row", eof)},
		"definitions are there":             {executeOf(1), false, answers("\x01\x01", "column", eof, "row", eof)},
		"left out, without EOF":             {executeOf(1), true, answers("\x01\x00", "row", "\xfe\x00\x00\x02\x00\x00\x00")},
		"reports of progress":               {query("SELECT a FROM t"), false, answers("\xff\xff\xff1", "\x01", "column", "\xff\xff\xff2", eof, eof)},
		"ping":                              {packet(0, comPing), false, answers(string(okPacket))},
		"a statement's reset":               {numbered(comStmtReset, 1), false, answers(string(okPacket))},
		"a close, which has none":           {numbered(comStmtClose, 5), false, nil},
		"long data, which has none":         {numbered(comStmtSendLongData, 1, 0, 0, 'x'), false, nil},
		"a row of 16 MiB":                   {query("SELECT a FROM t"), false, slices.Concat(answers("\x01", "column", eof), packet(4, make([]byte, packetGoesOn)...), packet(5, 0xfe, 0, 0, 2, 0), packet(6, []byte(eof)...))},
		"a row of 16 MiB that ends at once": {query("SELECT a FROM t"), false, slices.Concat(answers("\x01", "column", eof), packet(4, make([]byte, packetGoesOn)...), packet(5), packet(6, []byte(eof)...))},
	} {
		for _, size := range []int{1 << 20, 1 + len(c.answer)/1000} {
			client := logged(t)
			client.server.deprecateEOF = c.deprecateEOF
			take(t, client, prepareOf("SELECT a FROM t"))
			client.Server(preparedOK(1, 0, 0))
			take(t, client, c.command)
			for piece := range slices.Chunk(c.answer, size) {
				client.Server(piece)
			}

			take(t, client, prepareOf("DELETE FROM u"))
			client.Server(preparedOK(2, 0, 0))

			if u := take(t, client, executeOf(2)); u.Verb != "delete" || client.statements.isBlind {
				t.Errorf("%s, in pieces of %d: %#v, blind %v", name, size, u, client.statements.isBlind)
			}
		}
	}
}

func TestAnswersThatAreNotUnderstoodMakeTheFollowerBlind(t *testing.T) {
	for name, c := range map[string]struct{ command, answer []byte }{
		"a request for a file":     {query("SELECT a FROM t"), answers("\xfb/etc/passwd")},
		"a number left out":        {query("SELECT a FROM t"), packet(2, okPacket...)},
		"an empty packet":          {query("SELECT a FROM t"), packet(1)},
		"an EOF is missing":        {query("SELECT a FROM t"), answers("\x01", "column", "row", "row")},
		"bytes behind a count":     {query("SELECT a FROM t"), answers("\x01\x01\x01")},
		"a short ok":               {query("SELECT a FROM t"), answers("\x00\x00\x00")},
		"an answer to nothing":     {nil, packet(0, okPacket...)},
		"an answer too many":       {packet(0, comPing), answers(string(okPacket), string(okPacket))},
		"a result of a ping":       {packet(0, comPing), answers("\x01", "column", eof, eof)},
		"a prepare answered short": {prepareOf("SELECT a FROM t"), answers("\x00\x01\x00\x00\x00")},
		"a command before the end": {query("SELECT a FROM t"), answers("\x01")},
	} {
		client := logged(t)
		take(t, client, prepareOf("SELECT a FROM t"))
		client.Server(preparedOK(1, 0, 0))
		if c.command != nil {
			take(t, client, c.command)
		}
		client.Server(c.answer)

		take(t, client, packet(0, comPing))

		if !client.statements.isBlind {
			t.Errorf("%s: numbers are still known", name)
		}
		if u := take(t, client, executeOf(1)); u.Verb != "select" {
			t.Errorf("%s: the one statement is %#v", name, u)
		}
		take(t, client, prepareOf("DELETE FROM u"))
		refuse(t, client, executeOf(1), policy.ReasonUnsupported)
	}
}

func TestInsideTLSAllStatementsHaveToBeTheSameMessage(t *testing.T) {
	c := blind(t)
	take(t, c, prepareOf("SELECT a FROM t WHERE b = ?"))
	take(t, c, prepareOf("SELECT b FROM t"))
	if u := take(t, c, executeOf(12345)); u.Kind != Message || u.Verb != "select" || !slices.Equal(u.Read, []string{"t"}) {
		t.Errorf("%#v", u)
	}
	take(t, c, numbered(comStmtClose, 1))
	take(t, c, numbered(comStmtReset, 1))
	take(t, c, prepareOf("DELETE FROM u"))

	// What the program closed may have been any number.
	refuse(t, c, executeOf(2), policy.ReasonUnsupported)
}

func TestInsideTLSAResetOfTheConnectionClosesAll(t *testing.T) {
	c := blind(t)
	take(t, c, prepareOf("SELECT a FROM t"))
	take(t, c, prepareOf("DELETE FROM u"))
	take(t, c, packet(0, comResetConnection))
	take(t, c, prepareOf("DELETE FROM u"))

	if u := take(t, c, executeOf(1)); u.Verb != "delete" {
		t.Errorf("%#v", u)
	}
}

func TestInsideTLSAStatementHasToBePrepared(t *testing.T) {
	for _, data := range [][]byte{executeOf(1), numbered(comStmtReset, 1), numbered(comStmtSendLongData, 1, 0, 0)} {
		refuse(t, blind(t), data, policy.ReasonMalformed)
	}
}

func TestTheServerIsNotHeardInsideTLS(t *testing.T) {
	c := blind(t)
	take(t, c, prepareOf("SELECT a FROM t"))

	c.Server(preparedOK(1, 0, 0))

	if c.statements.known != nil || !c.statements.isBlind {
		t.Error("a number was learnt")
	}
}

func TestCommandsOfPreparedStatementsAreStrict(t *testing.T) {
	for name, c := range map[string]struct {
		data   []byte
		reason policy.Reason
	}{
		"a cursor":                   {numbered(comStmtExecute, 1, 1, 1, 0, 0, 0), policy.ReasonUnsupported},
		"attributes":                 {numbered(comStmtExecute, 1, 8, 1, 0, 0, 0), policy.ReasonUnsupported},
		"two iterations":             {numbered(comStmtExecute, 1, 0, 2, 0, 0, 0), policy.ReasonMalformed},
		"a short execute":            {numbered(comStmtExecute, 1, 0, 1, 0, 0), policy.ReasonMalformed},
		"an execute without number":  {packet(0, comStmtExecute, 1), policy.ReasonMalformed},
		"MariaDB's last":             {executeOf(last), policy.ReasonUnsupported},
		"MariaDB's last, reset":      {numbered(comStmtReset, last), policy.ReasonUnsupported},
		"MariaDB's last, closed":     {numbered(comStmtClose, last), policy.ReasonUnsupported},
		"MariaDB's last, long data":  {numbered(comStmtSendLongData, last, 0, 0), policy.ReasonUnsupported},
		"a short close":              {packet(0, comStmtClose, 1, 0, 0), policy.ReasonMalformed},
		"a long close":               {numbered(comStmtClose, 1, 0), policy.ReasonMalformed},
		"a long reset":               {numbered(comStmtReset, 1, 0), policy.ReasonMalformed},
		"a reset of another":         {numbered(comStmtReset, 2), policy.ReasonMalformed},
		"short long data":            {numbered(comStmtSendLongData, 1, 0), policy.ReasonMalformed},
		"long data for another":      {numbered(comStmtSendLongData, 2, 0, 0), policy.ReasonMalformed},
		"a fetch":                    {numbered(0x1c, 1, 1, 0, 0, 0), policy.ReasonUnsupported},
		"MariaDB's bulk execute":     {numbered(0xfa, 1, 0, 0), policy.ReasonUnsupported},
		"an option":                  {packet(0, 0x1b, 0, 0), policy.ReasonUnsupported},
		"another user":               {packet(0, 0x11, 'u', 0), policy.ReasonUnsupported},
		"another schema":             {packet(0, 0x02, 'm'), policy.ReasonUnsupported},
		"two statements":             {prepareOf("SELECT a FROM t; DELETE FROM u"), policy.ReasonUnsupported},
		"an executable comment":      {prepareOf("SELECT a /*! FROM t */"), policy.ReasonUnsupported},
		"a file":                     {prepareOf("LOAD DATA LOCAL INFILE '/x' INTO TABLE t"), policy.ReasonUnsupported},
		"a setting":                  {prepareOf("SET NAMES utf8mb4"), policy.ReasonUnsupported},
		"nothing":                    {prepareOf(""), policy.ReasonMalformed},
		"parameters outside prepare": {query("SELECT a FROM t WHERE b = ?"), policy.ReasonMalformed},
	} {
		client := logged(t)
		take(t, client, prepareOf("SELECT a FROM t"))
		client.Server(preparedOK(1, 0, 0))
		t.Run(name, func(t *testing.T) { refuse(t, client, c.data, c.reason) })
	}
}

func TestLongDataIsBoundedUntilAnExecute(t *testing.T) {
	c := logged(t)
	take(t, c, prepareOf("INSERT INTO t (a) VALUES (?)"))
	c.Server(slices.Concat(preparedOK(1, 0, 1), packet(2, 'p'), packet(3, []byte(eof)...)))
	piece := numbered(comStmtSendLongData, 1, make([]byte, longDataMax/2)...)
	for range 3 {
		take(t, c, piece)
		take(t, c, executeOf(1))
		c.Server(answers(string(okPacket)))
	}
	take(t, c, piece)
	take(t, c, numbered(comStmtClose, 5))

	refuse(t, c, piece, policy.ReasonTooLarge)
}

func TestPreparedStatementsAreBounded(t *testing.T) {
	for name, text := range map[string]string{
		"in number": "SELECT 1",
		"in names":  "SELECT 1 FROM " + strings.Repeat("x", 64) + "." + strings.Repeat("y", 64),
	} {
		c := logged(t)
		most := statementsMax
		if name == "in names" {
			most = min(most, statementNamesMax/129)
		}
		for i := range most {
			take(t, c, prepareOf(text))
			c.Server(preparedOK(uint32(i), 0, 0))
		}
		t.Run(name, func(t *testing.T) { refuse(t, c, prepareOf(text), policy.ReasonTooLarge) })
	}
}
