package http1

import "kalium.dev/kalium/runtime/internal/wire"

// Body follows one body to its end. It looks at the framing only and keeps none of the bytes.
type Body struct {
	untilClose bool
	chunked    bool
	max        int64 // bytes of content that may still come

	left  int64 // of the content or of the current chunk
	state chunkState
	size  int64 // of the chunk size that is being read
	digit int   // digits read of it
}

type chunkState uint8

const (
	inSize chunkState = iota
	inSizeLF
	inData
	inDataCR
	inDataLF
	inEndCR
	inEndLF
	ended
)

// NewBody follows a body of length bytes, or a chunked one, or one that the end of the connection ends. max bounds
// its content in bytes. A head without a body is length 0.
func NewBody(length int64, chunked, untilClose bool, max int64) *Body {
	body := &Body{}
	body.Reset(length, chunked, untilClose, max)
	return body
}

// Reset begins to follow another body, as NewBody does.
func (d *Body) Reset(length int64, chunked, untilClose bool, max int64) {
	*d = Body{untilClose: untilClose, chunked: chunked, max: max, left: length}
	if !chunked && !untilClose && length == 0 {
		d.state = ended
	}
}

// Feed takes the bytes of the body at the front of b: n of them belong to it and may go on; done says that the body
// ended with them, so that b[n:] begins something else. n may be less than len(b) only when done or when err is set,
// and with an error the first n bytes are still of the body. An error is final.
func (d *Body) Feed(b []byte) (n int, done bool, err error) {
	if d.chunked {
		return d.feedChunked(b)
	}
	if d.state == ended {
		return 0, true, nil
	}
	if d.untilClose {
		if int64(len(b)) > d.max {
			n = int(d.max)
			d.max = 0
			return n, false, wire.TooLarge("a body beyond its bound")
		}
		d.max -= int64(len(b))
		return len(b), false, nil
	}
	if d.left > d.max {
		return 0, false, wire.TooLarge("a body of %d bytes, at most %d", d.left, d.max)
	}
	n = int(min(int64(len(b)), d.left))
	d.left -= int64(n)
	d.max -= int64(n)
	if d.left == 0 {
		d.state = ended
	}
	return n, d.left == 0, nil
}

// feedChunked reads RFC 9112 section 7.1 without chunk extensions and trailers: both are places for bytes that no
// policy speaks about, and some servers skip them by other rules than others.
func (d *Body) feedChunked(b []byte) (n int, done bool, err error) {
	for n < len(b) || d.state == ended {
		if d.state == ended {
			return n, true, nil
		}
		if d.state == inData {
			taken := min(int64(len(b)-n), d.left)
			n += int(taken)
			if d.left -= taken; d.left == 0 {
				d.state = inDataCR
			}
			continue
		}
		if err := d.frame(b[n]); err != nil {
			return n, false, err
		}
		n++
	}
	return n, d.state == ended, nil
}

// frame takes one byte of the framing.
func (d *Body) frame(c byte) error {
	want := byte('\n')
	if d.state == inDataCR || d.state == inEndCR {
		want = '\r'
	}
	if d.state != inSize {
		if c != want {
			return wire.Malformed("byte %#02x where a chunk's line ends", c)
		}
	}
	switch d.state {
	case inSize:
		return d.sizeByte(c)
	case inSizeLF:
		if d.size > d.max {
			return wire.TooLarge("a chunked body beyond its bound")
		}
		d.max -= d.size
		d.left = d.size
		d.state = inData
		if d.size == 0 {
			d.state = inEndCR
		}
		d.size, d.digit = 0, 0
	case inDataCR:
		d.state = inDataLF
	case inDataLF:
		d.state = inSize
	case inEndCR:
		d.state = inEndLF
	case inEndLF:
		d.state = ended
	}
	return nil
}

func (d *Body) sizeByte(c byte) error {
	var value int64
	switch {
	case c >= '0' && c <= '9':
		value = int64(c - '0')
	case c >= 'a' && c <= 'f':
		value = int64(c-'a') + 10
	case c >= 'A' && c <= 'F':
		value = int64(c-'A') + 10
	case c == '\r' && d.digit > 0:
		d.state = inSizeLF
		return nil
	default:
		return wire.Malformed("byte %#02x in a chunk size", c)
	}
	if d.digit++; d.digit > chunkLineMax-1 {
		return wire.Malformed("a chunk size of more than %d digits", chunkLineMax-1)
	}
	d.size = d.size<<4 | value
	return nil
}
