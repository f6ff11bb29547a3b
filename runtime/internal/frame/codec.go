package frame

import (
	"encoding/binary"
	"math"
	"slices"
	"unicode/utf8"
)

// The codec knows the subset of msgpack that frames use, in its one canonical form: maps with sorted str keys, each
// once; the shortest form of every integer and length; str in UTF-8. Two encoders of the same fields give the same
// bytes, so the vectors of tests/vectors can compare bytes and a decoder has nothing to forgive.

// First bytes of the msgpack specification ("Formats").
const (
	codeFixMap   = 0x80 // to 0x8f
	codeFixArray = 0x90 // to 0x9f
	codeFixStr   = 0xa0 // to 0xbf
	codeNil      = 0xc0
	codeFalse    = 0xc2
	codeTrue     = 0xc3
	codeBin8     = 0xc4
	codeBin16    = 0xc5
	codeBin32    = 0xc6
	codeUint8    = 0xcc
	codeUint16   = 0xcd
	codeUint32   = 0xce
	codeUint64   = 0xcf
	codeInt8     = 0xd0
	codeInt16    = 0xd1
	codeInt32    = 0xd2
	codeInt64    = 0xd3
	codeStr8     = 0xd9
	codeStr16    = 0xda
	codeStr32    = 0xdb
	codeArray16  = 0xdc
	codeArray32  = 0xdd
	codeMap16    = 0xde
	codeMap32    = 0xdf
)

// field is one entry of a message's map. value points to the Go variable that holds it; its type is the field's type.
type field struct {
	name  string
	value any
}

// record is a map with a closed set of fields. Its list is sorted by name, and both directions walk it in order:
// because a canonical map is sorted too, "same fields" and "same sequence" are the same thing.
type record interface{ fields() []field }

func appendRecord(dst []byte, fields []field) ([]byte, error) {
	dst = appendCount(dst, len(fields), codeFixMap, codeMap16)
	var err error
	for _, f := range fields {
		dst = append(append(dst, codeFixStr|byte(len(f.name))), f.name...) // TestFieldsAreSorted holds that they are short
		if dst, err = appendValue(dst, f); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

func appendValue(dst []byte, f field) ([]byte, error) {
	var err error
	switch v := f.value.(type) {
	case *bool:
		if *v {
			return append(dst, codeTrue), nil
		}
		return append(dst, codeFalse), nil
	case *int:
		return appendInt(dst, int64(*v)), nil
	case *string:
		dst, err = appendText(dst, *v)
	case *[]byte:
		return appendBytes(dst, *v), nil
	case *[]string:
		dst, err = appendTexts(dst, *v)
	case *[]int:
		if err = countAllowed(len(*v)); err != nil {
			break
		}
		dst = appendCount(dst, len(*v), codeFixArray, codeArray16)
		for _, element := range *v {
			dst = appendInt(dst, int64(element))
		}
	case *map[string][]string:
		dst, err = appendMap(dst, *v, appendTexts)
	case *map[string][]byte:
		dst, err = appendMap(dst, *v, func(dst []byte, data []byte) ([]byte, error) { return appendBytes(dst, data), nil })
	case *map[string]int:
		dst, err = appendMap(dst, *v, func(dst []byte, n int) ([]byte, error) { return appendInt(dst, int64(n)), nil })
	case record:
		dst, err = appendRecord(dst, v.fields())
	default:
		panic("frame: a field of a type that the codec does not know")
	}
	if err != nil {
		return nil, broken("field %s: %v", f.name, err)
	}
	return dst, nil
}

func appendMap[T any](dst []byte, entries map[string]T, value func([]byte, T) ([]byte, error)) ([]byte, error) {
	if err := countAllowed(len(entries)); err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for name := range entries {
		names = append(names, name)
	}
	slices.Sort(names)
	dst = appendCount(dst, len(names), codeFixMap, codeMap16)
	var err error
	for _, name := range names {
		if dst, err = appendText(dst, name); err != nil {
			return nil, err
		}
		if dst, err = value(dst, entries[name]); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

func countAllowed(n int) error {
	if n > ItemsMax {
		return broken("%d elements, at most %d", n, ItemsMax)
	}
	return nil
}

// appendCount writes the head of an array or a map. ItemsMax keeps n below 1<<16.
func appendCount(dst []byte, n int, fix, code16 byte) []byte {
	if n < 16 {
		return append(dst, fix|byte(n))
	}
	return binary.BigEndian.AppendUint16(append(dst, code16), uint16(n))
}

func appendTexts(dst []byte, texts []string) ([]byte, error) {
	if err := countAllowed(len(texts)); err != nil {
		return nil, err
	}
	dst = appendCount(dst, len(texts), codeFixArray, codeArray16)
	var err error
	for _, text := range texts {
		if dst, err = appendText(dst, text); err != nil {
			return nil, err
		}
	}
	return dst, nil
}

func appendText(dst []byte, text string) ([]byte, error) {
	if err := textAllowed(text); err != nil {
		return nil, err
	}
	switch n := len(text); {
	case n < 32:
		dst = append(dst, codeFixStr|byte(n))
	case n <= math.MaxUint8:
		dst = append(dst, codeStr8, byte(n))
	default:
		dst = binary.BigEndian.AppendUint16(append(dst, codeStr16), uint16(n))
	}
	return append(dst, text...), nil
}

func textAllowed(text string) error {
	if len(text) > TextBytesMax {
		return broken("a text of %d bytes, at most %d", len(text), TextBytesMax)
	}
	if !utf8.ValidString(text) {
		return broken("a text that is not UTF-8")
	}
	return nil
}

func appendBytes(dst, data []byte) []byte {
	switch n := len(data); {
	case n <= math.MaxUint8:
		dst = append(dst, codeBin8, byte(n))
	case n <= math.MaxUint16:
		dst = binary.BigEndian.AppendUint16(append(dst, codeBin16), uint16(n))
	default:
		dst = binary.BigEndian.AppendUint32(append(dst, codeBin32), uint32(n))
	}
	return append(dst, data...)
}

func appendInt(dst []byte, n int64) []byte {
	switch {
	case n >= 0 && n <= math.MaxInt8, n < 0 && n >= -32:
		return append(dst, byte(n))
	case n >= 0 && n <= math.MaxUint8:
		return append(dst, codeUint8, byte(n))
	case n >= 0 && n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, codeUint16), uint16(n))
	case n >= 0 && n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(dst, codeUint32), uint32(n))
	case n >= 0:
		return binary.BigEndian.AppendUint64(append(dst, codeUint64), uint64(n))
	case n >= math.MinInt8:
		return append(dst, codeInt8, byte(n))
	case n >= math.MinInt16:
		return binary.BigEndian.AppendUint16(append(dst, codeInt16), uint16(n))
	case n >= math.MinInt32:
		return binary.BigEndian.AppendUint32(append(dst, codeInt32), uint32(n))
	default:
		return binary.BigEndian.AppendUint64(append(dst, codeInt64), uint64(n))
	}
}

// decoder takes values from the front of rest. It never allocates by a length that the peer states: every element
// takes at least one byte of what has arrived, and every count has a bound.
type decoder struct{ rest []byte }

// record reads a map into fields.
func (d *decoder) record(fields []field) error {
	n, err := d.count(codeFixMap, codeMap16, codeMap32, "map")
	if err != nil {
		return err
	}
	for i := range n {
		name, err := d.rawText()
		if err == nil && i < len(fields) && string(name) == fields[i].name {
			if err := d.value(fields[i].value); err != nil {
				return broken("field %s: %v", fields[i].name, err)
			}
			continue
		}
		if err == nil {
			err = textAllowed(string(name))
		}
		if err != nil {
			return broken("the name of a field: %v", err)
		}
		if i == len(fields) || string(name) < fields[i].name {
			return broken("field %q is unknown, twice there, or not in its place", name)
		}
		return broken("field %q is missing, or %q is unknown", fields[i].name, name)
	}
	if n < len(fields) {
		return broken("field %q is missing", fields[n].name)
	}
	return nil
}

func (d *decoder) value(into any) (err error) {
	switch v := into.(type) {
	case *bool:
		*v, err = d.bool()
	case *int:
		*v, err = d.int()
	case *string:
		*v, err = d.text()
	case *[]byte:
		*v, err = d.bytes()
	case *[]string:
		*v, err = d.texts()
	case *[]int:
		*v, err = array(d, d.int)
	case *map[string][]string:
		*v, err = entries(d, d.texts)
	case *map[string][]byte:
		*v, err = entries(d, d.bytes)
	case *map[string]int:
		*v, err = entries(d, d.int)
	case record:
		err = d.record(v.fields())
	default:
		panic("frame: a field of a type that the codec does not know")
	}
	return err
}

func (d *decoder) texts() ([]string, error) { return array(d, d.text) }

func array[T any](d *decoder, element func() (T, error)) ([]T, error) {
	n, err := d.count(codeFixArray, codeArray16, codeArray32, "array")
	if err != nil {
		return nil, err
	}
	list := make([]T, 0, min(n, len(d.rest)))
	for range n {
		value, err := element()
		if err != nil {
			return nil, err
		}
		list = append(list, value)
	}
	return list, nil
}

func entries[T any](d *decoder, element func() (T, error)) (map[string]T, error) {
	n, err := d.count(codeFixMap, codeMap16, codeMap32, "map")
	if err != nil {
		return nil, err
	}
	out := make(map[string]T, min(n, len(d.rest)))
	last := ""
	for i := range n {
		name, err := d.text()
		if err != nil {
			return nil, err
		}
		if i > 0 && name <= last {
			return nil, broken("key %q is not after the one before it", name)
		}
		if out[name], err = element(); err != nil {
			return nil, err
		}
		last = name
	}
	return out, nil
}

func (d *decoder) bool() (bool, error) {
	code, err := d.byte()
	if err != nil {
		return false, err
	}
	if code != codeTrue && code != codeFalse {
		return false, wrongType(code, "bool")
	}
	return code == codeTrue, nil
}

func (d *decoder) int() (int, error) {
	code, err := d.byte()
	if err != nil {
		return 0, err
	}
	if code < codeFixMap || code >= 0xe0 {
		return int(int8(code)), nil
	}
	size := 0
	switch code {
	case codeUint8, codeInt8:
		size = 1
	case codeUint16, codeInt16:
		size = 2
	case codeUint32, codeInt32:
		size = 4
	case codeUint64, codeInt64:
		size = 8
	default:
		return 0, wrongType(code, "int")
	}
	raw, err := d.number(size)
	if err != nil {
		return 0, err
	}
	n := int64(raw)
	if code >= codeInt8 {
		shift := 64 - 8*size
		n = n << shift >> shift
	} else if raw > math.MaxInt64 {
		return 0, broken("an integer beyond 63 bits")
	}
	// Of all forms only one is the one that the encoder writes.
	if shortest := appendInt(make([]byte, 0, 9), n); shortest[0] != code {
		return 0, broken("an integer that is not in its shortest form")
	}
	return int(n), nil
}

func (d *decoder) text() (string, error) {
	raw, err := d.rawText()
	if err != nil {
		return "", err
	}
	text := string(raw)
	return text, textAllowed(text)
}

// rawText is text that was not looked at, and still the reader's.
func (d *decoder) rawText() ([]byte, error) {
	code, err := d.byte()
	if err != nil {
		return nil, err
	}
	n := int(code &^ 0xe0)
	if code&0xe0 != codeFixStr {
		if n, err = d.length(code, 32, codeStr8, codeStr16, codeStr32, "str"); err != nil {
			return nil, err
		}
	}
	if n > TextBytesMax {
		return nil, broken("a text of %d bytes, at most %d", n, TextBytesMax)
	}
	return d.take(n)
}

func (d *decoder) bytes() ([]byte, error) {
	code, err := d.byte()
	if err != nil {
		return nil, err
	}
	n, err := d.length(code, 0, codeBin8, codeBin16, codeBin32, "bin")
	if err != nil {
		return nil, err
	}
	raw, err := d.take(n)
	if err != nil {
		return nil, err
	}
	return slices.Clone(raw), nil // the reader's buffer is used again
}

// length reads the length behind code. least is the smallest length that the form of one byte may state.
func (d *decoder) length(code byte, least uint64, code8, code16, code32 byte, name string) (int, error) {
	size := 0
	switch code {
	case code8:
		size = 1
	case code16:
		size, least = 2, 1<<8
	case code32:
		size, least = 4, 1<<16
	default:
		return 0, wrongType(code, name)
	}
	n, err := d.number(size)
	if err != nil {
		return 0, err
	}
	if n < least {
		return 0, broken("a length of %s that is not in its shortest form", name)
	}
	return int(n), nil
}

func (d *decoder) count(fix, code16, code32 byte, name string) (int, error) {
	code, err := d.byte()
	if err != nil {
		return 0, err
	}
	if code&0xf0 == fix {
		return int(code & 0x0f), nil
	}
	size, least := 2, uint64(16)
	switch code {
	case code16:
	case code32:
		size, least = 4, 1<<16
	default:
		return 0, wrongType(code, name)
	}
	n, err := d.number(size)
	if err != nil {
		return 0, err
	}
	if n < least {
		return 0, broken("a length of %s that is not in its shortest form", name)
	}
	if n > ItemsMax {
		return 0, broken("%d elements, at most %d", n, ItemsMax)
	}
	return int(n), nil
}

func (d *decoder) byte() (byte, error) {
	raw, err := d.take(1)
	if err != nil {
		return 0, err
	}
	return raw[0], nil
}

func (d *decoder) number(size int) (uint64, error) {
	raw, err := d.take(size)
	if err != nil {
		return 0, err
	}
	var n uint64
	for _, b := range raw {
		n = n<<8 | uint64(b)
	}
	return n, nil
}

func (d *decoder) take(n int) ([]byte, error) {
	if n > len(d.rest) {
		return nil, broken("the payload ends inside a value")
	}
	raw := d.rest[:n]
	d.rest = d.rest[n:]
	return raw, nil
}

func wrongType(code byte, want string) error {
	found := "another type"
	switch {
	case code == codeNil:
		found = "nil"
	case code == codeTrue || code == codeFalse:
		found = "bool"
	case code < codeFixMap, code >= 0xe0, code >= codeUint8 && code <= codeInt64:
		found = "int"
	case code&0xe0 == codeFixStr, code >= codeStr8 && code <= codeStr32:
		found = "str"
	case code >= codeBin8 && code <= codeBin32:
		found = "bin"
	case code&0xf0 == codeFixArray, code == codeArray16, code == codeArray32:
		found = "array"
	case code&0xf0 == codeFixMap, code == codeMap16, code == codeMap32:
		found = "map"
	}
	return broken("%s where %s is expected", found, want)
}
