// Package smtp reads what a client sends over SMTP (RFC 5321) with STARTTLS (RFC 3207), AUTH (RFC 4954), BDAT (RFC 3030)
// and pipelining (RFC 2920).
//
// The grammar is narrow: what a server might read as another command, another address or another end of a mail is refused.
// So lines end with CRLF and never hold a bare CR or LF (a server that ends a mail at a bare LF would read the rest of
// its text as commands), local parts are dot-atoms without the characters that old servers route by, and no other
// command than those listed passes.
//
// # What the server says
//
// Whether bytes are commands or text depends on the server's replies: one that refuses DATA reads the text as commands.
// In clear Server follows the replies. The text of a mail is then only taken after 354, an authentication goes on only
// after 334, chunks only go to a server that announced them, and nothing passes between STARTTLS and its reply: a
// ClientHello may hold bytes that a server without STARTTLS would obey.
//
// Inside TLS replies are not seen, and what could be seen could not be trusted: in TLS 1.3 nothing ties the server's
// secret that a program logs to the connection. There
//   - text that a server would read as an envelope command (MAIL or RCPT with an address at the beginning of a line) is
//     refused, in chunks of BDAT in clear as well;
//   - an authentication is only begun while the server cannot hold an envelope;
//   - a server that refused a mail may still hold its envelope. So until RSET a further mail must have the same sender,
//     and counts as one to the recipients of the mails before it as well.
//
// # Bounds
//
// A Client keeps at most recipientsMax recipients of addressMax bytes, commandsMax commands without a reply (a byte
// each), and the first bytes of a line of reply: less than 40 KiB. Of the client's bytes nothing is kept.
package smtp

import (
	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds of the client's side.
const (
	commandBytesMax = 512  // RFC 5321 section 4.5.3.1.4, with CRLF
	textBytesMax    = 1000 // of a line of text, section 4.5.3.1.6, with CRLF; also of a line of AUTH
	recipientsMax   = 100  // section 4.5.3.1.8
	commandsMax     = 128  // pipelined, without a reply
	authLinesMax    = 4    // that follow one AUTH
	chunkDigitsMax  = 10
)

// Kind tells what a unit is. The zero kind is no unit at all.
type Kind uint8

// Kinds of units.
const (
	Support  Kind = iota + 1 // upkeep: judged here, never a step of the function CFG
	Envelope                 // MAIL or RCPT: could such a mail be sent now? Nothing is sent yet
	Mail                     // DATA or the first BDAT: the mail is sent
	Body                     // text of a mail
	StartTLS                 // STARTTLS: after the server's 220 the client goes on inside TLS, see InTLS
)

// Unit is what stands at the front of the client's bytes.
type Unit struct {
	Kind  Kind
	Text  string   // normalised, never payload
	From  string   // Envelope and Mail: the sender, its domain in lower case
	To    []string // as From: the recipients so far, sorted, without repetitions
	Bytes int      // Body: how many bytes of the mail's text are in b[:n]
	End   bool     // the mail ends with this unit: Body, or the command when its chunk is empty
}

type phase uint8

const (
	inCommands   phase = iota
	awaitingText       // DATA was sent, its reply has not come
	inText
	inChunk // inside a chunk of BDAT
	awaitingAuth
	inAuth
	awaitingTLS
	ended // behind QUIT
)

// Client follows one connection. Its methods must not be called at the same time.
type Client struct {
	phase   phase
	inTLS   bool
	refused error

	hasSender            bool // MAIL was sent, and the mail or RSET was not
	from                 string
	to                   []string
	isChunked            bool // the first BDAT of this mail was sent
	isUnsure             bool // inside TLS: the server may hold the envelope of a mail before, from and to
	recipients           int  // RCPT commands of this mail
	mails, mailsAnswered int  // MAIL commands so far
	chunk                int64
	isLast               bool // chunk
	authLines            int
	text                 text
	replies              replies
}

// NewClient begins a connection whose first bytes are the server's greeting.
func NewClient() *Client { return &Client{} }

// InTLS tells that the server has taken STARTTLS: what the client sends from now on is TLS, and Next is for what is
// inside. It has to be asked before bytes behind a StartTLS unit are read.
func (c *Client) InTLS() bool { return c.inTLS }

// Server takes what the server sends in clear, in order and in any pieces, before the client sees it. It must not be
// called with what comes inside TLS.
func (c *Client) Server(b []byte) {
	for len(b) > 0 && !c.inTLS {
		var r reply
		var whole bool
		if r, b, whole = c.replies.next(b); whole {
			c.answered(r)
		}
	}
}

// Next reads one unit from the front of b, which must not be empty. After an error other than wire.ErrShort the
// connection cannot be followed any more and every call returns that error.
func (c *Client) Next(b []byte) (n int, u Unit, err error) {
	if c.refused != nil {
		return 0, Unit{}, c.refused
	}
	n, u, err = c.next(b)
	if err != nil && err != wire.ErrShort {
		c.refused = err
		return 0, Unit{}, err
	}
	return n, u, err
}

func (c *Client) next(b []byte) (int, Unit, error) {
	switch c.phase {
	case awaitingText:
		return 0, Unit{}, wire.Malformed("text of a mail before the server's reply to DATA")
	case awaitingAuth:
		return 0, Unit{}, wire.Malformed("bytes before the server's reply to AUTH")
	case awaitingTLS:
		return 0, Unit{}, wire.Malformed("bytes before the server's reply to STARTTLS")
	case ended:
		return 0, Unit{}, wire.Malformed("bytes behind QUIT")
	case inText:
		return c.lines(b)
	case inChunk:
		return c.content(b)
	}
	if !c.inTLS && !c.replies.greeted {
		return 0, Unit{}, wire.Malformed("a command before the server's greeting")
	}
	line, n, err := cutLine(b)
	if err != nil {
		return 0, Unit{}, err
	}
	var u Unit
	if c.phase == inAuth {
		u, err = c.authLine(line)
	} else {
		u, err = c.command(line)
	}
	return n, u, err
}

// cutLine takes a line of printable ASCII off b; the line comes without its CRLF.
func cutLine(b []byte) (line []byte, n int, err error) {
	for i, c := range b[:min(len(b), textBytesMax)] {
		switch {
		case c == '\r':
			if i+1 == len(b) {
				return nil, 0, wire.ErrShort
			}
			if i+2 > textBytesMax {
				break
			}
			if b[i+1] != '\n' {
				return nil, 0, wire.Malformed("a bare CR in a command")
			}
			return b[:i], i + 2, nil
		case c < 0x20 || c >= 0x7f:
			return nil, 0, wire.Malformed("byte %#02x in a command", c)
		}
	}
	if len(b) >= textBytesMax {
		return nil, 0, wire.TooLarge("a command of more than %d bytes", textBytesMax)
	}
	return nil, 0, wire.ErrShort
}
