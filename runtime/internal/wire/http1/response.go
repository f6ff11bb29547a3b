package http1

import (
	"bytes"
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// ResponseHead is what the end of an answer depends on (RFC 9112 section 6.3).
type ResponseHead struct {
	Status int
	Fields []Field

	ContentLength int64
	Chunked       bool
	UntilClose    bool // the body ends with the connection
	NoBody        bool // HEAD, 1xx, 204, 304: none follows, whatever the fields say
	Interim       bool // 1xx: another head follows
	Close         bool // the server means to close after it
}

// ParseResponse reads the head of an answer to a request with the given method. HTTP/1.0 answers, which Python's
// http.server writes, and field values beyond ASCII pass; a body whose end two readers would see at different places
// does not.
func ParseResponse(b []byte, method string) (head *ResponseHead, n int, err error) {
	n, err = responseEnd(b)
	if err != nil {
		return nil, 0, err
	}
	line, rest := cutLine(string(b[:n]))
	head = &ResponseHead{}
	version, status, ok := statusLine(line)
	if !ok {
		return nil, 0, wire.Malformed("a status line that does not parse")
	}
	head.Status = status
	if head.Fields, err = parseFields(rest, classToken, nil); err != nil {
		return nil, 0, err
	}
	head.Close = version == "HTTP/1.0"
	head.Interim = status < 200
	if status == 101 {
		// What follows would be another protocol.
		return nil, 0, wire.Unsupported("status 101")
	}
	head.NoBody = head.Interim || status == 204 || status == 304 || method == "HEAD"
	if err := head.framing(version); err != nil {
		return nil, 0, err
	}
	return head, n, nil
}

func responseEnd(b []byte) (int, error) {
	end := bytes.Index(b, []byte("\r\n\r\n"))
	if end < 0 {
		if len(b) >= HeadBytesMax {
			return 0, wire.TooLarge("an answer's head of more than %d bytes", HeadBytesMax)
		}
		end = len(b)
		if prefix := "HTTP/1."; !strings.HasPrefix(string(b[:min(len(b), len(prefix))]), prefix[:min(len(b), len(prefix))]) {
			return 0, wire.Malformed("an answer that does not begin with HTTP/1.")
		}
		if err := checkLines(b[:end], false); err != nil {
			return 0, err
		}
		return 0, wire.ErrShort
	}
	if end+4 > HeadBytesMax {
		return 0, wire.TooLarge("an answer's head of more than %d bytes", HeadBytesMax)
	}
	return end + 4, checkLines(b[:end+4], true)
}

// checkLines refuses NUL and single CR or LF; other bytes are the server's business.
func checkLines(b []byte, whole bool) error {
	for i, c := range b {
		switch c {
		case 0:
			return wire.Malformed("a zero byte in an answer's head")
		case '\n':
			if i == 0 || b[i-1] != '\r' {
				return wire.Malformed("a line feed without a carriage return")
			}
		case '\r':
			if i+1 < len(b) && b[i+1] != '\n' || i+1 == len(b) && whole {
				return wire.Malformed("a carriage return without a line feed")
			}
		}
	}
	return nil
}

func statusLine(line string) (version string, status int, ok bool) {
	if len(line) < 12 || len(line) > reasonTextMax || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return "", 0, false
	}
	version = line[:8]
	if version != "HTTP/1.0" && version != "HTTP/1.1" {
		return "", 0, false
	}
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return "", 0, false
		}
		status = status*10 + int(c-'0')
	}
	return version, status, status >= 100
}

func (h *ResponseHead) framing(version string) error {
	var length, encoding string
	lengths, encodings := 0, 0
	for i := range h.Fields {
		field := &h.Fields[i]
		switch strings.ToLower(field.Name) {
		case "content-length":
			// RFC 9110 section 8.6 lets a recipient take equal repetitions for one.
			if lengths > 0 && field.Value != length {
				return wire.Malformed("two different Content-Length in an answer")
			}
			length, lengths = field.Value, lengths+1
		case "transfer-encoding":
			encoding, encodings = field.Value, encodings+1
		case "connection":
			for _, option := range strings.Split(field.Value, ",") {
				switch strings.ToLower(strings.Trim(option, " \t")) {
				case "close":
					h.Close = true
				case "keep-alive":
					h.Close = false
				}
			}
		}
	}
	switch {
	case h.NoBody:
		return nil
	case encodings > 0:
		if encodings > 1 || lengths > 0 || !strings.EqualFold(encoding, "chunked") || version != "HTTP/1.1" {
			return wire.Malformed("an answer whose Transfer-Encoding leaves its end open")
		}
		h.Chunked = true
	case lengths > 0:
		var ok bool
		if h.ContentLength, ok = ParseLength(length); !ok {
			return wire.Malformed("an answer's Content-Length that is not a plain number")
		}
	default:
		h.UntilClose, h.Close = true, true
	}
	return nil
}
