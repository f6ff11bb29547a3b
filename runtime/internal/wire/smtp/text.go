package smtp

import (
	"bytes"

	"kalium.dev/kalium/runtime/internal/wire"
)

// text checks the text of a mail in chunks of BDAT, which may be cut anywhere: lines of at most textBytesMax bytes that end
// with CRLF, without a bare CR or LF and without a zero byte. The reply to BDAT only comes behind the chunk, so that no line
// may look like a command, in clear either.
type text struct {
	length int  // of the line so far
	isCR   bool // its last byte
	line   scanner
}

func (t *text) feed(c byte) error {
	if t.isCR != (c == '\n') {
		return bareEnd()
	}
	if c == 0 {
		return zeroByte()
	}
	if t.length++; t.length > textBytesMax {
		return wire.TooLarge("a line of more than %d bytes in the text of a mail", textBytesMax)
	}
	t.isCR = c == '\r'
	if t.line.feed(c) {
		return readsLikeACommand()
	}
	if c == '\n' {
		t.length, t.line = 0, scanner{}
	}
	return nil
}

// lines reads whole lines of text behind DATA.
func (c *Client) lines(b []byte) (int, Unit, error) {
	at := 0
	for {
		n := bytes.IndexByte(b[at:], '\n') + 1
		line := b[at : at+n]
		var err error
		switch {
		case n > textBytesMax, n == 0 && len(b)-at >= textBytesMax:
			err = wire.TooLarge("a line of more than %d bytes in the text of a mail", textBytesMax)
		case n == 0:
			err = wire.ErrShort
		case string(line) == ".\r\n":
			c.phase = inCommands
			if err := c.expect(toOther); err != nil {
				return 0, Unit{}, err
			}
			c.sent()
			return at + n, Unit{Kind: Body, Text: "smtp text", Bytes: at, End: true}, nil
		case n == 1, bytes.IndexByte(line, '\r') != n-2:
			err = bareEnd()
		case bytes.IndexByte(line, 0) >= 0:
			err = zeroByte()
		case c.inTLS && isCommand(line):
			err = readsLikeACommand()
		}
		if err == nil {
			at += n
			continue
		}
		if at == 0 {
			return 0, Unit{}, err
		}
		return at, Unit{Kind: Body, Text: "smtp text", Bytes: at}, nil
	}
}

func isCommand(line []byte) bool {
	var s scanner
	for _, c := range line {
		if s.feed(c) {
			return true
		}
		if s.state == harmless {
			break
		}
	}
	return false
}

func bareEnd() error { return wire.Malformed("a bare CR or LF in the text of a mail") }

func zeroByte() error { return wire.Malformed("a zero byte in the text of a mail") }

func readsLikeACommand() error {
	return wire.Unsupported("text of a mail that reads like an envelope command, where the server may be reading commands")
}

// content reads what there is of a chunk.
func (c *Client) content(b []byte) (int, Unit, error) {
	n := int(min(int64(len(b)), c.chunk))
	for _, next := range b[:n] {
		if err := c.text.feed(next); err != nil {
			return 0, Unit{}, err
		}
	}
	if c.chunk -= int64(n); c.chunk > 0 {
		return n, Unit{Kind: Body, Text: "smtp chunk", Bytes: n}, nil
	}
	isLast := c.isLast
	if err := c.endChunk(); err != nil {
		return 0, Unit{}, err
	}
	return n, Unit{Kind: Body, Text: "smtp chunk", Bytes: n, End: isLast}, nil
}

// endChunk ends a chunk, and behind the last one the mail. A chunk must not end where a server that reads commands would
// put the next command's bytes behind the beginning of another.
func (c *Client) endChunk() error {
	if c.text.line.isOpen() {
		return wire.Unsupported("a chunk that ends in the first word of a line")
	}
	if c.isLast && c.text.isCR {
		return wire.Malformed("a bare CR in the text of a mail")
	}
	c.phase = inCommands
	if c.isLast {
		c.sent()
	}
	return nil
}

// scanner looks for a line that some server takes for MAIL or RCPT: white space, the verb, white space, and then an
// address, which begins behind ':' or '<'. That is more than FROM: and TO:, which not all servers insist on.
type scanner struct {
	state scanning
	verb  string // which the line may begin with
	bytes int    // of it so far
}

var verbs = [...]string{"MAIL", "RCPT"}

type scanning uint8

const (
	beforeVerb scanning = iota
	inVerb
	behindVerb // of MAIL or RCPT
	harmless
)

// isOpen tells whether the line has begun and could still become a command.
func (s *scanner) isOpen() bool { return s.state == inVerb || s.state == behindVerb }

func (s *scanner) feed(c byte) (isCommand bool) {
	isSpace := c == ' ' || c >= '\t' && c <= '\r'
	switch s.state {
	case beforeVerb:
		if !isSpace {
			s.state = inVerb
			return s.feed(c)
		}
	case inVerb:
		if isSpace && s.bytes == len(verbs[0]) {
			s.state = behindVerb
			break
		}
		if s.bytes == 0 {
			s.verb = verbs[0]
			if c&^0x20 == verbs[1][0] {
				s.verb = verbs[1]
			}
		}
		if s.bytes == len(s.verb) || c&^0x20 != s.verb[s.bytes] {
			s.state = harmless
			break
		}
		s.bytes++
	case behindVerb:
		return c == ':' || c == '<'
	}
	return false
}
