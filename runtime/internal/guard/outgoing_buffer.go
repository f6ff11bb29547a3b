package guard

import "sync"

const (
	bufferBytes    = 32 << 10
	bufferBytesMax = 512 << 10 // larger ones are not kept
)

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, bufferBytes); return &b }}

// buffer is memory that goes back to a pool. The zero buffer has none, and appending to b without grow is fine, too.
type buffer struct {
	b    []byte
	home *[]byte
}

// begin takes memory, if there is none.
func (f *buffer) begin() {
	if f.home == nil {
		f.home = buffers.Get().(*[]byte)
		f.b = append((*f.home)[:0], f.b...)
	}
}

// end gives the memory back.
func (f *buffer) end() {
	if f.home == nil {
		f.b = nil
		return
	}
	if *f.home = f.b[:0]; cap(f.b) <= bufferBytesMax {
		buffers.Put(f.home)
	}
	f.b, f.home = nil, nil
}
