package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// line is one whole line as it was read. Nothing of it is believed before hasItsHash.
type line struct {
	prev, hash string
	entry      []byte
}

// parseLine takes a line with its line feed apart.
func parseLine(raw []byte) (line, bool) {
	if len(raw) < lineEntryOffset+len("{}}\n") || !bytes.HasPrefix(raw, []byte(linePrefix)) || !bytes.HasSuffix(raw, []byte("}}\n")) {
		return line{}, false
	}
	rest := raw[len(linePrefix):]
	l := line{prev: string(rest[:hashHex])}
	rest, ok := bytes.CutPrefix(rest[hashHex:], []byte(lineHash))
	if !ok {
		return line{}, false
	}
	l.hash = string(rest[:hashHex])
	rest, ok = bytes.CutPrefix(rest[hashHex:], []byte(lineEntry))
	if !ok {
		return line{}, false
	}
	l.entry = rest[:len(rest)-len("}\n")]
	return l, true
}

func (l *line) hasItsHash() bool {
	sum := sha256.Sum256(append(append([]byte(l.prev), '\n'), l.entry...))
	return hex.EncodeToString(sum[:]) == l.hash
}

// said is what a line that is read again needs to say.
type said struct {
	Seq   int64  `json:"seq"`
	Event string `json:"event"`
	Log   string `json:"log"`
}

func readLine(raw []byte) (line, said, error) {
	l, ok := parseLine(raw)
	if !ok || !l.hasItsHash() {
		return line{}, said{}, errors.New("it does not verify")
	}
	var s said
	if err := json.Unmarshal(l.entry, &s); err != nil {
		return line{}, said{}, err
	}
	if s.Seq < 1 {
		return line{}, said{}, errors.New("it has no number")
	}
	return l, s, nil
}

// found is what an earlier run has left in a file: where its whole lines begin and end, and the half one behind them.
type found struct {
	firstSeq   int64
	log        string
	last       Place
	wholeBytes int64 // 0: there is no whole line, and the three above say nothing
	torn       []byte
}

// readEnds reads the ends of a file. An error says that its first or its last line is none of ours, or does not verify
// by itself.
func readEnds(file io.ReaderAt, size int64) (found, error) {
	tail := make([]byte, min(size, tornBytesMax+lineBytesMax))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return found{}, err
	}
	feed := bytes.LastIndexByte(tail, '\n')
	torn := tail[feed+1:]
	if len(torn) > tornBytesMax {
		return found{}, fmt.Errorf("it ends in more than %d bytes without a line feed", tornBytesMax)
	}
	if feed < 0 {
		return found{torn: torn}, nil
	}
	whole := tail[:feed+1]
	last, lastSaid, err := readLine(whole[bytes.LastIndexByte(whole[:feed], '\n')+1:])
	if err != nil {
		return found{}, fmt.Errorf("its last line: %w", err)
	}
	head := make([]byte, min(size, lineBytesMax))
	if _, err := file.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return found{}, err
	}
	_, firstSaid, err := readLine(head[:bytes.IndexByte(head, '\n')+1])
	if err != nil {
		return found{}, fmt.Errorf("its first line: %w", err)
	}
	if firstSaid.Event != eventOpen || !isHex(firstSaid.Log, logHex) {
		return found{}, errors.New("its first line is no entry `open` that names a log")
	}
	return found{
		firstSeq: firstSaid.Seq, log: firstSaid.Log, last: Place{Seq: lastSaid.Seq, Hash: last.hash},
		wholeBytes: size - int64(len(torn)), torn: torn,
	}, nil
}

func isHex(text string, length int) bool {
	for i := range len(text) {
		if c := text[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(text) == length
}
