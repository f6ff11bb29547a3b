// Package audit writes an audit log: what was denied, refused or changed, in a chain of signed lines that nobody can edit
// unseen. docs/reference/audit.md is its specification, kalium/audit its Python twin, and there is the verification.
//
// A Chain makes the lines and does no I/O; a journal brings them to the disk; a Log does so on a goroutine.
package audit

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"strconv"
	"strings"
)

// Format is what a head signs first.
const Format = "kalium-audit/v1"

// Events that agents write. Open and head belong to the chain itself.
const (
	EventVerdict    = "verdict"
	EventPolicy     = "policy"
	EventMode       = "mode"
	EventSuppressed = "suppressed"
	EventOutage     = "outage"

	eventOpen = "open"
	eventHead = "head"
)

const (
	headMS          = 1000 // no entry is added while one that is so old has no head behind it
	entryBytesMax   = 64 * 1024
	lineBytesMax    = entryBytesMax + 256
	frameRoom       = 256 // a line has fewer bytes around the fields of its entry
	headLineRoom    = 512 // a head's line has fewer
	fieldsBytesMax  = entryBytesMax - 128
	linePrefix      = `{"prev":"`
	lineHash        = `","hash":"`
	lineEntry       = `","entry":`
	hashHex         = 2 * sha256.Size
	lineEntryOffset = len(linePrefix) + hashHex + len(lineHash) + hashHex + len(lineEntry)
)

// start is what the first line of a log names as the one before it.
var start = strings.Repeat("0", hashHex)

// Writer says who writes a log. Log names the chain and Run this start of the writer, each by 16 hexadecimal digits.
type Writer struct {
	Writer string // agent or controller
	Name   string // of the node, or of the controller
	Run    string
	Log    string
}

// Place is the last line of a chain: its number and its hash.
type Place struct {
	Seq  int64
	Hash string
}

// Part is lines to append. With Rotated, a new file begins with them, and the one before gets that behind its name.
type Part struct {
	Data    []byte
	Rotated string
}

// Chain adds entries behind Place. It is not shared between goroutines.
type Chain struct {
	Who       Writer
	Key       ed25519.PrivateKey
	BytesMax  int64 // of a file; one entry alone may be longer
	Place     Place
	FileSeq   int64 // of the current file's first entry; 0: it has none yet
	FileBytes int64 // of the current file

	hasUnsigned bool
	unsignedMS  int64 // time of the oldest entry without a head behind it
	parts       []Part
	lines       []byte
	rotated     string
	entry       []byte // scratch
	sum         hash.Hash
}

// opening is what an entry `open` says.
type opening struct {
	Writer     string `json:"writer"`
	Name       string `json:"name"`
	Run        string `json:"run"`
	Log        string `json:"log"`
	Why        string `json:"why"` // first, restart or rotation
	TornBytes  int    `json:"torn_bytes"`
	TornSHA256 string `json:"torn_sha256"`
}

// Open says that the writer has started, and which half-written line it has found and cut off.
func (c *Chain) Open(nowMS int64, torn []byte) {
	why := "first"
	switch {
	case c.FileSeq != 0:
		why = "restart"
	case c.Place.Seq != 0:
		why = "rotation"
	}
	c.open(nowMS, why, torn)
}

func (c *Chain) open(nowMS int64, why string, torn []byte) {
	said := opening{Writer: c.Who.Writer, Name: c.Who.Name, Run: c.Who.Run, Log: c.Who.Log, Why: why, TornBytes: len(torn)}
	if len(torn) > 0 {
		sum := sha256.Sum256(torn)
		said.TornSHA256 = hex.EncodeToString(sum[:])
	}
	fields, err := json.Marshal(said)
	if err != nil {
		panic(err) // texts and a number
	}
	c.add(eventOpen, fields, nowMS)
}

// Append adds an entry, and a head before it when one is due. fields is a JSON object without line feeds and without the
// names seq, time_ms and event. An entry that is too long is an error and adds nothing.
func (c *Chain) Append(event string, fields []byte, nowMS int64) error {
	if len(fields) > fieldsBytesMax {
		return fmt.Errorf("an audit entry of %d bytes, at most %d", len(fields), fieldsBytesMax)
	}
	if c.HeadDue(nowMS) {
		c.Seal(nowMS)
	}
	if c.FileSeq != 0 && c.FileBytes+int64(len(fields))+frameRoom+headLineRoom > c.BytesMax {
		c.StartFile(nowMS)
	}
	c.add(event, fields, nowMS)
	return nil
}

// HeadDue tells whether an entry has waited long enough for its head. A clock that went back does not make it wait longer.
func (c *Chain) HeadDue(nowMS int64) bool {
	return c.hasUnsigned && (nowMS < c.unsignedMS || nowMS-c.unsignedMS >= headMS)
}

// Seal signs what has no head behind it yet.
func (c *Chain) Seal(nowMS int64) {
	if !c.hasUnsigned {
		return
	}
	seq := c.Place.Seq + 1
	signature := ed25519.Sign(c.Key, fmt.Appendf(nil, "%s\n%s\n%d\n%d", Format, c.hash(), seq, nowMS))
	c.begin(eventHead, nowMS)
	c.entry = append(c.entry, `,"signature":"`...)
	c.entry = base64.StdEncoding.AppendEncode(c.entry, signature)
	c.entry = append(c.entry, `"}`...)
	c.put()
	c.hasUnsigned = false
}

// StartFile goes on in a new file. The current one ends with a head.
func (c *Chain) StartFile(nowMS int64) {
	c.Seal(nowMS)
	c.cut()
	c.rotated, c.FileSeq, c.FileBytes = suffix(c.FileSeq), 0, 0
	c.open(nowMS, "rotation", nil)
}

// Take returns the lines since the last call.
func (c *Chain) Take() []Part {
	c.cut()
	parts := c.parts
	c.parts = nil
	return parts
}

// Waiting is how many bytes Take would return.
func (c *Chain) Waiting() int {
	n := len(c.lines)
	for _, part := range c.parts {
		n += len(part.Data)
	}
	return n
}

// suffix is what a file's name gets behind it once the next file has begun: the number of its first entry.
func suffix(firstSeq int64) string { return fmt.Sprintf(".%012d", firstSeq) }

func (c *Chain) hash() string {
	if c.Place.Seq == 0 {
		return start
	}
	return c.Place.Hash
}

func (c *Chain) begin(event string, nowMS int64) {
	c.entry = append(c.entry[:0], `{"seq":`...)
	c.entry = strconv.AppendInt(c.entry, c.Place.Seq+1, 10)
	c.entry = append(c.entry, `,"time_ms":`...)
	c.entry = strconv.AppendInt(c.entry, nowMS, 10)
	c.entry = append(c.entry, `,"event":"`...)
	c.entry = append(c.entry, event...)
	c.entry = append(c.entry, '"')
}

func (c *Chain) add(event string, fields []byte, nowMS int64) {
	c.begin(event, nowMS)
	if len(fields) > len("{}") {
		c.entry = append(c.entry, ',')
	}
	c.entry = append(c.entry, fields[1:]...)
	c.put()
	if !c.hasUnsigned {
		c.hasUnsigned, c.unsignedMS = true, nowMS
	}
}

// put makes the line of c.entry.
func (c *Chain) put() {
	if c.sum == nil {
		c.sum = sha256.New()
	}
	before := len(c.lines)
	prev := c.hash()
	c.lines = append(c.lines, linePrefix...)
	c.lines = append(c.lines, prev...)
	c.sum.Reset()
	c.sum.Write(c.lines[len(c.lines)-hashHex:])
	c.sum.Write([]byte{'\n'})
	c.sum.Write(c.entry)
	var own [sha256.Size]byte
	c.lines = append(c.lines, lineHash...)
	c.lines = hex.AppendEncode(c.lines, c.sum.Sum(own[:0]))
	c.Place = Place{Seq: c.Place.Seq + 1, Hash: string(c.lines[len(c.lines)-hashHex:])}
	c.lines = append(c.lines, lineEntry...)
	c.lines = append(c.lines, c.entry...)
	c.lines = append(c.lines, "}\n"...)
	if c.FileSeq == 0 {
		c.FileSeq = c.Place.Seq
	}
	c.FileBytes += int64(len(c.lines) - before)
}

func (c *Chain) cut() {
	if len(c.lines) > 0 || c.rotated != "" {
		c.parts = append(c.parts, Part{Data: c.lines, Rotated: c.rotated})
		c.lines, c.rotated = nil, ""
	}
}
