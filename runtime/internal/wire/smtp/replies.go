package smtp

import "bytes"

// replyLineMax bounds a line of the server; beyond it its replies are not followed any more.
const replyLineMax = 4096

// Reply codes that a client's next bytes depend on.
const (
	codeReady = 220
	codeGoOn  = 334
	codeText  = 354
)

// command is what a reply replies to, as far as it matters.
type command uint8

const (
	toOther command = iota
	toGreeting
	toEHLO
	toHELO
	toReset
	toMail
	toData
	toAuth
	toStartTLS
)

// reply is a whole reply of the server.
type reply struct {
	code     int
	chunking bool // one of its lines but the first says CHUNKING
}

// replies follows the server's side in clear.
type replies struct {
	queue    [commandsMax]command // a ring: what is without a reply
	first    int
	open     int
	greeted  bool
	lost     bool // the server said what is no reply to anything
	chunking bool // announced in the reply to EHLO

	line    [16]byte // the first bytes of the line
	length  int      // of the line so far
	current reply
	isInner bool // a line of the current reply has been read
}

func (r *replies) push(to command) {
	r.queue[(r.first+r.open)%commandsMax] = to
	r.open++
}

// pop takes the oldest command without a reply. The greeting replies to nothing that was sent.
func (r *replies) pop() (command, bool) {
	if !r.greeted {
		return toGreeting, true
	}
	if r.open == 0 {
		return 0, false
	}
	to := r.queue[r.first]
	r.first = (r.first + 1) % commandsMax
	r.open--
	return to, true
}

// next reads on in b up to the end of a reply.
func (r *replies) next(b []byte) (whole reply, rest []byte, ok bool) {
	for len(b) > 0 && !r.lost {
		n := bytes.IndexByte(b, '\n')
		part := b
		if n >= 0 {
			part = b[:n]
		}
		if r.length < len(r.line) {
			copy(r.line[r.length:], part)
		}
		if r.length += len(part); r.length > replyLineMax {
			r.lost = true
			break
		}
		if n < 0 {
			return reply{}, nil, false
		}
		b = b[n+1:]
		isEnd, isReply := r.endLine()
		if r.length = 0; !isReply {
			r.lost = true
			break
		}
		if isEnd {
			whole, r.current, r.isInner = r.current, reply{}, false
			return whole, b, true
		}
	}
	return reply{}, nil, false
}

// endLine reads a whole line (RFC 5321 section 4.2.1).
func (r *replies) endLine() (isEnd, isReply bool) {
	line := r.line[:min(r.length, len(r.line))]
	if r.length <= len(r.line) {
		line = bytes.TrimSuffix(line, []byte{'\r'})
	}
	if len(line) < 3 || !isDigit(line[0]) || !isDigit(line[1]) || !isDigit(line[2]) || len(line) > 3 && line[3] != ' ' && line[3] != '-' {
		return false, false
	}
	r.current.code = int(line[0]-'0')*100 + int(line[1]-'0')*10 + int(line[2]-'0')
	if r.isInner && len(line) > 4 && bytes.EqualFold(line[4:], []byte("CHUNKING")) {
		r.current.chunking = true
	}
	r.isInner = true
	return len(line) == 3 || line[3] == ' ', true
}
