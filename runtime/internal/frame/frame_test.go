package frame

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// samples has every message with every field set, and both shapes of those that have two.
func samples() []Message {
	identity := Identity{Instance: "c0ffee", App: "hello-retail", Function: "product-photos-1-assign"}
	step := "0123456789abcdef"
	return []Message{
		&Hello{Protos: []int{2, 300}, Container: "c0ffee", App: "hello-retail", Function: "product-photos-1-assign"},
		&Welcome{
			OK: true, Policy: []byte("envelope"), LeaseMS: 60000, Port: 8080, HealthPath: "/_/health",
			Names: map[string][]string{"gateway": {"10.137.0.1"}, "database": {"10.137.0.1", "10.137.0.2"}}, Sources: []string{"10.137.0.1/32"},
			Roots: []byte("-----BEGIN CERTIFICATE-----"),
		},
		&Welcome{Reason: "unregistered", Policy: []byte{}, Names: map[string][]string{}, Sources: []string{}, Roots: []byte{}},
		&Start{Step: step, Token: "t", Label: "call-1", Version: 7},
		&Start{Step: step, Version: 7, Identity: identity},
		&Invoke{Step: step, Call: "c", Invocation: "i", Callee: "product-photos-2-record", Version: 300},
		&Invoke{Step: step, Call: "c", Invocation: "i", Callee: "product-photos-2-record", Version: 70000, Identity: identity},
		&Answer{Allowed: true, Reason: "allowed", Call: "c", Invocation: "i", Token: "t", Expected: []string{}, Detail: ""},
		&Answer{Reason: "edge_not_allowed", Expected: []string{"invoke a", "invoke b"}, Detail: "détail"},
		&End{Call: "c", Invocation: "i", Outcome: "answered"},
		&End{Call: "c", Invocation: "i", Outcome: "timeout", Identity: identity},
		&Verdict{Record: VerdictRecord{
			Event: EventVerdict, Mode: "enforce", PolicyVersion: 1, Kind: "mysql", Message: "mysql select read t", Peer: "database",
			Reason: "out_of_order", Expected: []string{"mysql show-tables @line 3"}, Line: -1, States: []int{0, 127, 128, 255, 256, 65535, 65536}, LatencyUS: math.MaxInt64,
		}},
		&Policy{App: "hello-retail", Policy: bytes.Repeat([]byte{7}, 300)},
		&Lease{LeaseMS: 60000},
		&Names{Names: map[string][]string{"gateway": {"10.137.0.1"}}},
		&Times{
			Dropped: 2, Invocation: []string{"i", ""}, Kind: []string{"https", "off"}, Bytes: []int{1024, 0}, Record: []int{210, -1},
			Open: []int{1500, -1}, Event: []int{2600, -1}, Local: []int{400, -1}, Controller: []int{-1, -1}, Total: []int{9000, 1 << 40}, Reseal: []int{1300, -1},
		},
		&AgentHello{Protos: []int{2}, Node: "node-0", Run: step},
		&ControllerWelcome{OK: true, LeaseMS: 60000, Policies: map[string][]byte{"a": bytes.Repeat([]byte{1}, 70000), "b": {}}},
		&Register{Instance: "c0ffee", App: "hello-retail", Function: "f", Image: "localhost/kalium/f:1"},
		&Unregister{Instance: "c0ffee"},
		&Status{},
		&StatusAnswer{Status: StatusReport{
			Policies: map[string]int{"hello-retail": 3}, Agents: 1, Calls: -33, Invocations: 1 << 40, Controller: "c0", Controllers: []string{"c0"},
			Store: "memory", StartedMS: 1, Node: []string{"n"}, App: []string{"a"}, Function: []string{"f"}, Asked: []string{"enforce"},
			Mode: []string{"none"}, Version: []int{0}, Count: []int{3}, Denied: map[string]int{"a out_of_order": 2}, WouldDeny: map[string]int{},
			FailModes: map[string]int{}, Evicted: map[string]int{"timeout": 1},
		}},
		&Finish{Call: "c", Invocation: "i", Outcome: "answered"},
		&Finish{Call: "c", Invocation: "i", Outcome: "closed", Identity: identity},
		&Mode{Mode: "enforce", Version: 7},
		&Ping{},
		&Pong{},
		&Report{
			AuditSeq: 9, AuditHash: "ab", App: []string{"a"}, Function: []string{"f"}, Mode: []string{"enforce"}, Version: []int{7}, Count: []int{1},
			Denied: map[string]int{"a bad_token": 1}, WouldDeny: map[string]int{}, FailModes: map[string]int{"a allow": 4},
		},
	}
}

func idOf(m Message) uint32 {
	if kinds[m.Type()].correlated {
		return 7
	}
	return 0
}

func encode(t testing.TB, m Message) []byte {
	t.Helper()
	data, err := Append(nil, idOf(m), m)
	if err != nil {
		t.Fatalf("%#v: %v", m, err)
	}
	return data
}

func TestEveryMessageComesBackAsItWas(t *testing.T) {
	seen := map[Type]bool{}
	for _, m := range samples() {
		data := encode(t, m)

		id, back, n, err := Decode(append(data, "KL"...))

		if err != nil || id != idOf(m) || n != len(data) || !reflect.DeepEqual(back, m) {
			t.Errorf("%#v came back as id %d, %#v, %d of %d bytes, %v", m, id, back, n, len(data), err)
		}
		seen[m.Type()] = true
	}
	for kind := range kinds {
		if !seen[kind] {
			t.Errorf("no sample of type %d", kind)
		}
	}
}

func TestFieldsAreSorted(t *testing.T) {
	byName := func(a, b field) int { return strings.Compare(a.name, b.name) }
	records := []record{new(VerdictRecord), new(StatusReport), new(Identity)}
	for _, kind := range kinds {
		records = append(records, kind.make())
	}
	for _, r := range records {
		if !slices.IsSortedFunc(r.fields(), byName) {
			t.Errorf("the fields of %T are not sorted", r)
		}
		for _, f := range r.fields() {
			if len(f.name) >= 32 {
				t.Errorf("%s of %T has no form of one byte", f.name, r)
			}
		}
	}
}

func TestEverySplitGivesTheSameFrames(t *testing.T) {
	var stream []byte
	want := samples()
	for _, m := range want {
		if len(encode(t, m)) < 1000 {
			stream = append(stream, encode(t, m)...)
		}
	}
	for _, size := range []int{1, 2, 3, 7, 11, 12, 13, 64, len(stream)} {
		var reader Reader
		var got []byte
		for piece := range slices.Chunk(stream, size) {
			reader.Feed(piece)
			for {
				id, m, err := reader.Next()
				if err == ErrShort {
					break
				}
				if err != nil {
					t.Fatalf("pieces of %d bytes: %v", size, err)
				}
				if got, err = Append(got, id, m); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !bytes.Equal(got, stream) || reader.Held() != 0 {
			t.Errorf("pieces of %d bytes: another stream came out, %d bytes held", size, reader.Held())
		}
	}
}

func TestAnErrorOfTheReaderIsFinal(t *testing.T) {
	var reader Reader
	reader.Feed([]byte("GET / HTTP/1.1\r\n"))
	_, _, first := reader.Next()
	reader.Feed(encode(t, &Lease{LeaseMS: 1}))

	_, _, second := reader.Next()

	var broken *Error
	if !errors.As(first, &broken) || second != first {
		t.Errorf("errors %v, then %v", first, second)
	}
}

func TestAnUnfinishedFrameIsHeldAndCounted(t *testing.T) {
	data := encode(t, &Lease{LeaseMS: 60000})
	for size := range len(data) {
		var reader Reader
		reader.Feed(data[:size])
		if _, _, err := reader.Next(); err != ErrShort || reader.Held() != size {
			t.Errorf("%d bytes: %v, %d held", size, err, reader.Held())
		}
	}
}

// raw makes a frame around a payload given in hexadecimal, whatever it is.
func raw(kind Type, id uint32, payload string) []byte {
	body, err := hex.DecodeString(strings.ReplaceAll(payload, " ", ""))
	if err != nil {
		panic(err)
	}
	n := len(body)
	head := []byte{'K', 'L', 1, byte(kind), byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id), byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
	return append(head, body...)
}

func TestWhatIsNotCanonicalIsRefused(t *testing.T) {
	const leaseMS = "a86c656173655f6d73"               // "lease_ms"
	const app, name = "a3617070", "a8696e7374616e6365" // "app", "instance"
	cases := []struct {
		name string
		data []byte
		text string // part of the error
	}{
		{"another magic", []byte("KX"), "byte 1 of a frame"},
		{"another version", []byte{'K', 'L', 2}, "byte 2 of a frame"},
		{"type 0", []byte{'K', 'L', 1, 0}, "type 0 is unknown"},
		{"type between the hops", []byte{'K', 'L', 1, 14}, "type 14 is unknown"},
		{"a length beyond the bound", []byte{'K', 'L', 1, 9, 0, 0, 0, 0, 0, 16, 0, 1}, "1048577 bytes"},
		{"a question without an id", raw(TypeStatus, 0, "80"), "id 0"},
		{"an id on a message without an answer", raw(TypeLease, 1, "81"+leaseMS+"01"), "id 1"},
		{"no payload", raw(TypeStatus, 1, ""), "ends inside a value"},
		{"no map", raw(TypeStatus, 1, "90"), "array where map is expected"},
		{"nil for a map", raw(TypeStatus, 1, "c0"), "nil where map is expected"},
		{"bytes behind the map", raw(TypeStatus, 1, "8080"), "1 bytes follow"},
		{"an unknown field", raw(TypeStatus, 1, "81a17801"), `field "x" is unknown`},
		{"an unknown field that sorts behind the last", raw(TypeLease, 0, "82"+leaseMS+"01a17a01"), `field "z" is unknown`},
		{"a missing field", raw(TypeLease, 0, "80"), `field "lease_ms" is missing`},
		{"a field twice", raw(TypeLease, 0, "82"+leaseMS+"01"+leaseMS+"01"), "twice there"},
		{"fields not sorted", raw(TypePolicy, 0, "82a6706f6c696379c400"+app+"a0"), `field "app" is missing`},
		{"a field's name as bin", raw(TypeLease, 0, "81c4086c656173655f6d7301"), "bin where str is expected"},
		{"bool for int", raw(TypeLease, 0, "81"+leaseMS+"c3"), "bool where int is expected"},
		{"float for int", raw(TypeLease, 0, "81"+leaseMS+"ca00000000"), "another type where int is expected"},
		{"nil for int", raw(TypeLease, 0, "81"+leaseMS+"c0"), "nil where int is expected"},
		{"int for str", raw(TypeUnregister, 0, "81"+name+"01"), "int where str is expected"},
		{"bin for str", raw(TypeUnregister, 0, "81"+name+"c40161"), "bin where str is expected"},
		{"str for bin", raw(TypePolicy, 0, "82"+app+"a0a6706f6c696379a0"), "str where bin is expected"},
		{"ext for str", raw(TypeUnregister, 0, "81"+name+"d40161"), "another type where str is expected"},
		{"uint8 for a small number", raw(TypeLease, 0, "81"+leaseMS+"cc7f"), "shortest form"},
		{"uint16 for a number of one byte", raw(TypeLease, 0, "81"+leaseMS+"cd00ff"), "shortest form"},
		{"uint32 for a number of two bytes", raw(TypeLease, 0, "81"+leaseMS+"ce0000ffff"), "shortest form"},
		{"uint64 for a number of four bytes", raw(TypeLease, 0, "81"+leaseMS+"cf00000000ffffffff"), "shortest form"},
		{"int8 for a positive number", raw(TypeLease, 0, "81"+leaseMS+"d001"), "shortest form"},
		{"int8 for a small negative number", raw(TypeLease, 0, "81"+leaseMS+"d0e0"), "shortest form"},
		{"int16 for a number of one byte", raw(TypeLease, 0, "81"+leaseMS+"d1ff80"), "shortest form"},
		{"int64 for a positive number of eight bytes", raw(TypeLease, 0, "81"+leaseMS+"d30fffffffffffffff"), "shortest form"},
		{"a number beyond 63 bits", raw(TypeLease, 0, "81"+leaseMS+"cf8000000000000000"), "beyond 63 bits"},
		{"str8 for a short text", raw(TypeUnregister, 0, "81"+name+"d90161"), "shortest form"},
		{"bin16 for short bytes", raw(TypePolicy, 0, "82"+app+"a0a6706f6c696379c5000161"), "shortest form"},
		{"map16 for few fields", raw(TypeStatus, 1, "de0000"), "shortest form"},
		{"array16 for few elements", raw(TypeNames, 0, "81a56e616d6573 81 a161 dc0000"), "shortest form"},
		{"str that is not UTF-8", raw(TypeUnregister, 0, "81"+name+"a1ff"), "not UTF-8"},
		{"str that holds a surrogate", raw(TypeUnregister, 0, "81"+name+"a3eda080"), "not UTF-8"},
		{"a text beyond its bound", raw(TypeUnregister, 0, "81"+name+"da0201"+strings.Repeat("61", 513)), "513 bytes"},
		{"a text that is cut", raw(TypeUnregister, 0, "81"+name+"a261"), "ends inside a value"},
		{"bytes longer than the frame", raw(TypePolicy, 0, "82"+app+"a0a6706f6c696379c6ffffffff"), "ends inside a value"},
		{"more elements than allowed", raw(TypeNames, 0, "81a56e616d6573 81 a161 dc1001"), "4097 elements"},
		{"keys of a map not sorted", raw(TypeNames, 0, "81a56e616d6573 82 a162 90 a161 90"), "not after the one before"},
		{"a key of a map twice", raw(TypeNames, 0, "81a56e616d6573 82 a161 90 a161 90"), "not after the one before"},
		{"deeper than the message's shape", raw(TypeNames, 0, "81a56e616d6573 81 a161 91 91 91 a0"), "array where str is expected"},
	}
	for _, c := range cases {
		_, m, _, err := Decode(c.data)

		var broken *Error
		if !errors.As(err, &broken) || !strings.Contains(broken.Text, c.text) {
			t.Errorf("%s: got %#v, %v; want an error with %q", c.name, m, err, c.text)
		}
	}
}

func TestTheIdentityIsWholeOrAbsent(t *testing.T) {
	whole := encode(t, &End{Call: "c", Invocation: "i", Outcome: "closed", Identity: Identity{Instance: "x"}})
	empty := bytes.Replace(whole, []byte("\xa8instance\xa1x"), []byte("\xa8instance\xa0"), 1)
	empty[11]--
	partial := bytes.Replace(whole, []byte("\xa3app\xa0"), nil, 1)
	partial[11] -= 5
	partial[12]--

	if _, _, _, err := Decode(whole); err != nil {
		t.Errorf("the second shape: %v", err)
	}
	for name, data := range map[string][]byte{"empty": empty, "partial": partial} {
		if _, m, _, err := Decode(data); err == nil {
			t.Errorf("an identity that is %s was read as %#v", name, m)
		}
	}
}

func TestWhatAppendWouldNotReadItDoesNotWrite(t *testing.T) {
	long := strings.Repeat("x", TextBytesMax+1)
	step := "0123456789abcdef"
	cases := map[string]struct {
		id uint32
		m  Message
	}{
		"question without an id":     {0, &Status{}},
		"id without an answer":       {1, &Lease{}},
		"text beyond its bound":      {0, &Unregister{Instance: long}},
		"text that is not UTF-8":     {0, &Unregister{Instance: "\xff"}},
		"key beyond its bound":       {0, &Names{Names: map[string][]string{long: nil}}},
		"element beyond its bound":   {0, &Names{Names: map[string][]string{"a": {long}}}},
		"too many elements":          {0, &Names{Names: map[string][]string{"a": make([]string, ItemsMax+1)}}},
		"a payload beyond its bound": {0, &Policy{Policy: make([]byte, FrameBytesMax)}},
		"a short step":               {1, &Start{Step: "1"}},
		"a step in upper case":       {1, &Invoke{Step: strings.ToUpper(step)}},
		"a reason outside the set":   {1, &Answer{Reason: "because"}},
		"an empty reason":            {1, &Answer{}},
		"another event":              {0, &Verdict{Record: VerdictRecord{Reason: "allowed"}}},
		"a verdict without reason":   {0, &Verdict{Record: VerdictRecord{Event: EventVerdict}}},
		"an outcome outside the set": {0, &End{Outcome: "done"}},
	}
	for name, c := range cases {
		data, err := Append(nil, c.id, c.m)

		var broken *Error
		if !errors.As(err, &broken) || data != nil {
			t.Errorf("%s: %x, %v", name, data, err)
		}
	}
}

func TestTheLargestPayloadPasses(t *testing.T) {
	m := &Policy{App: "a", Policy: make([]byte, FrameBytesMax-32)}
	data := encode(t, m)

	_, back, n, err := Decode(data)

	if err != nil || n != len(data) || !reflect.DeepEqual(back, m) {
		t.Errorf("%d bytes: %v", len(data), err)
	}
}

// FuzzDecode: whatever comes in, the only errors are the declared ones, and what is accepted has one encoding.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		data, err := Append(nil, idOf(m), m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		id, m, n, err := Decode(data)
		if err != nil {
			var broken *Error
			if err != ErrShort && !errors.As(err, &broken) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		again, err := Append(nil, id, m)
		if err != nil || !bytes.Equal(again, data[:n]) {
			t.Fatalf("%x was read as %#v, which is written as %x, %v", data[:n], m, again, err)
		}
	})
}

// What an agent does with a question and its answer.
func BenchmarkPassOn(b *testing.B) {
	question := encode(b, &Invoke{Step: "0123456789abcdef", Call: strings.Repeat("a", 32), Invocation: strings.Repeat("b", 32), Callee: "leaf", Version: 1})
	answer := encode(b, &Answer{Allowed: true, Reason: "allowed", Call: strings.Repeat("a", 32), Invocation: strings.Repeat("b", 32), Token: strings.Repeat("c", 32)})
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		_, m, _, err := Decode(question)
		if err != nil {
			b.Fatal(err)
		}
		m.(*Invoke).Identity = Identity{"instance", "app", "function"}
		if out, err = Append(out[:0], 1, m); err != nil {
			b.Fatal(err)
		}
		if _, m, _, err = Decode(answer); err != nil {
			b.Fatal(err)
		}
		if out, err = Append(out[:0], 1, m); err != nil {
			b.Fatal(err)
		}
	}
}
