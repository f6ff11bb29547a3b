package smtp

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// server is a mail server that reads commands leniently and refuses what it likes.
type server struct {
	dice                                       *rand.Rand
	chunking, startTLS, replaces, resetsByEHLO bool // what it knows and does
	refusals                                   int  // of ten commands of a mail

	pending  []byte
	reading  int // 0: commands, 1: text, 2: a line of AUTH, 3: a chunk
	chunk    int
	isLast   bool
	failed   bool // the chunk is discarded
	from     string
	to       []string
	replies  []string
	accepted []Unit // mails that it took
	isOver   bool   // TLS has begun
}

func (s *server) say(code int, text string) {
	s.replies = append(s.replies, fmt.Sprintf("%d %s\r\n", code, text))
}

func (s *server) refuses() bool { return s.dice.IntN(10) < s.refusals }

func (s *server) reset() { s.from, s.to = "", nil }

func (s *server) accept() {
	s.accepted = append(s.accepted, Unit{From: s.from, To: s.to})
	s.reset()
}

func (s *server) read(b []byte) {
	s.pending = append(s.pending, b...)
	for !s.isOver {
		if s.reading == 3 {
			n := min(s.chunk, len(s.pending))
			s.chunk, s.pending = s.chunk-n, s.pending[n:]
			if s.chunk > 0 {
				return
			}
			s.endChunk()
			continue
		}
		line, rest, whole := strings.Cut(string(s.pending), "\n")
		if !whole {
			return
		}
		s.pending = []byte(rest)
		line = strings.TrimSuffix(line, "\r")
		switch {
		case s.reading == 1 && line == ".":
			s.reading = 0
			if s.refuses() {
				s.reset()
				s.say(554, "no")
				continue
			}
			s.accept()
			s.say(250, "kept")
		case s.reading == 1:
		case s.reading == 2:
			if s.reading = 0; s.refuses() {
				s.say(535, "no")
			} else {
				s.say(235, "ok")
			}
		default:
			s.command(strings.TrimLeft(line, " \t"))
		}
	}
}

func (s *server) endChunk() {
	s.reading = 0
	switch {
	case s.failed:
		s.say(503, "no")
	case s.isLast:
		s.accept()
		s.say(250, "kept")
	default:
		s.say(250, "ok")
	}
}

func (s *server) command(line string) {
	verb, args, _ := strings.Cut(line, " ")
	// qmail takes what stands behind '<', or behind ':'.
	address := func() string {
		if _, a, found := strings.Cut(args, "<"); found {
			a, _, _ = strings.Cut(a, ">")
			return a
		}
		_, a, _ := strings.Cut(args, ":")
		return strings.TrimSpace(a)
	}
	switch strings.ToUpper(verb) {
	case "EHLO", "HELO":
		if s.resetsByEHLO {
			s.reset()
		}
		if s.chunking {
			s.replies = append(s.replies, "250-mail\r\n250 CHUNKING\r\n")
			return
		}
		s.say(250, "mail")
	case "MAIL":
		if s.from != "" && !s.replaces || s.refuses() {
			s.say(503, "no")
			return
		}
		s.from, s.to = address(), nil
		s.say(250, "ok")
	case "RCPT":
		if s.from == "" || s.refuses() {
			s.say(550, "no")
			return
		}
		s.to = append(s.to, address())
		s.say(250, "ok")
	case "DATA":
		if len(s.to) == 0 || s.refuses() {
			s.say(554, "no") // and the envelope stays
			return
		}
		s.reading = 1
		s.say(354, "go on")
	case "BDAT":
		if !s.chunking {
			s.say(500, "what")
			return
		}
		size, last, _ := strings.Cut(args, " ")
		s.chunk, _ = strconv.Atoi(size)
		s.isLast, s.failed, s.reading = strings.EqualFold(last, "LAST"), len(s.to) == 0 || s.refuses(), 3
	case "AUTH":
		if strings.Contains(args, " ") {
			s.say(235, "ok")
		} else if s.refuses() {
			s.say(504, "no")
		} else {
			s.reading = 2
			s.say(334, "")
		}
	case "STARTTLS":
		if !s.startTLS {
			s.say(502, "what")
			return
		}
		s.reset()
		s.say(220, "go")
		s.isOver = true
	case "RSET":
		s.reset()
		s.say(250, "ok")
	case "NOOP", "QUIT":
		s.say(250, "ok")
	default:
		s.say(500, "what")
	}
}

// fragments is what an attacker strings together.
var fragments = []string{
	"EHLO f\r\n", "RSET\r\n", "NOOP\r\n", "MAIL FROM:<a@x>\r\n", "MAIL FROM:<z@x>\r\n", "RCPT TO:<b@x>\r\n", "RCPT TO:<c@x>\r\n", "RCPT TO:<d@x>\r\n", "DATA\r\n",
	".\r\n", "x\r\n", "x\r\n.\r\n", "AUTH LOGIN\r\n", "YQ==\r\n", "AUTH PLAIN YQ==\r\n", "STARTTLS\r\n",
	"BDAT 3\r\nx\r\n", "BDAT 3 LAST\r\n.\r\n", "BDAT 6\r\nDATA\r\n", "BDAT 6 LAST\r\nDATA\r\n", "BDAT 0 LAST\r\n", "BDAT 3 LAST\r\nx\r\n", "BDAT 5 LAST\r\n\r\n.\r\n",
	"BDAT 17 LAST\r\nMAIL FROM:<z@x>\r\n", "BDAT 6 LAST\r\nRSET\r\n", "BDAT 5\r\nRCPT ", "BDAT 9 LAST\r\nx\r\n.\r\nMA\r", "IL FROM:<z@x>\r\n",
	"MAIL <z@x>\r\n", " RCPT TO:<d@x>\r\n", "BDAT 18 LAST\r\n.\r\nRCPT TO:<d@x>\r\n",
}

// Whatever a server refuses and whatever it does with an envelope, the mails that it takes were judged: each has the sender
// of a judged one of its own, and only recipients of it.
func TestWhatAServerTakesWasJudged(t *testing.T) {
	const seeds = 8000
	taken := 0
	for seed := range uint64(seeds) {
		dice := rand.New(rand.NewPCG(seed, 1))
		coin := func() bool { return dice.IntN(2) == 0 }
		s := &server{dice: dice, chunking: coin(), startTLS: coin(), replaces: coin(), resetsByEHLO: coin(), refusals: dice.IntN(6)}
		c := NewClient()
		c.Server([]byte("220 mail\r\n"))
		c.inTLS = coin()
		lag := dice.IntN(3)
		var judged []Unit
		var sent []string
		for range 60 {
			if !c.inTLS && len(s.replies) > 0 && dice.IntN(lag+1) == 0 {
				c.Server([]byte(strings.Join(s.replies, "")))
				s.replies = nil
			}
			if s.isOver && c.inTLS {
				s.isOver, s.startTLS = false, false
			}
			fragment := fragments[dice.IntN(len(fragments))]
			probe := *c
			probe.to = slices.Clone(c.to)
			if _, ok := swallow(&probe, fragment); !ok {
				continue // the attacker knows the rules
			}
			units, _ := swallow(c, fragment)
			judged = append(judged, units...)
			sent = append(sent, fragment)
			s.read([]byte(fragment))
		}
		taken += len(s.accepted)
		at := 0
		for _, mail := range s.accepted {
			for at < len(judged) && !covers(judged[at], mail) {
				at++
			}
			if at == len(judged) {
				t.Fatalf("seed %d: %+v was taken, judged were %+v; sent %q", seed, mail, judged, sent)
			}
			at++
		}
	}
	if taken < seeds/10 {
		t.Errorf("%d mails were taken: the test tries too little", taken)
	}
}

// swallow gives a fragment to c and returns the mails that it judged.
func swallow(c *Client, fragment string) (mails []Unit, ok bool) {
	for b := []byte(fragment); len(b) > 0; {
		n, u, err := c.Next(b)
		if err != nil {
			return nil, false
		}
		if b = b[n:]; u.Kind == Mail {
			mails = append(mails, u)
		}
	}
	return mails, true
}

func covers(judged, mail Unit) bool {
	for _, recipient := range mail.To {
		if !slices.Contains(judged.To, recipient) {
			return false
		}
	}
	return judged.From == mail.From
}
