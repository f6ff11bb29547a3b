package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// question writes a query by hand: flags, counts, one name of labels, type and class, and what follows.
func question(flags uint16, counts [4]uint16, labels []string, kind, class uint16, tail ...byte) []byte {
	out := binary.BigEndian.AppendUint16([]byte{0xab, 0xcd}, flags)
	for _, n := range counts {
		out = binary.BigEndian.AppendUint16(out, n)
	}
	for _, label := range labels {
		out = append(append(out, byte(len(label))), label...)
	}
	out = append(out, 0)
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint16(out, class)
	return append(out, tail...)
}

var (
	one     = [4]uint16{1, 0, 0, 0}
	withOPT = [4]uint16{1, 0, 0, 1}
	opt     = []byte{0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0}
	labels  = []string{"Images", "Kalium", "test"}
)

const wish = 0x0100 // RD

func TestAQueryIsRead(t *testing.T) {
	for name, data := range map[string][]byte{
		"of the C library": question(wish, one, labels, TypeA, ClassIN),
		"with EDNS":        question(wish|0x20, withOPT, labels, TypeA, ClassIN, opt...),
		"with a cookie":    question(wish, withOPT, labels, TypeA, ClassIN, append(slices.Clone(opt[:9]), 0, 5, 0, 10, 0, 1, 9)...),
		"without wishes":   question(0, one, labels, TypeA, ClassIN),
	} {
		query, err := ParseQuery(data)

		if want := (Query{ID: 0xabcd, Name: "images.kalium.test", Type: TypeA, Class: ClassIN}); err != nil || query != want {
			t.Errorf("%s: %#v, %v", name, query, err)
		}
	}
	if query, err := ParseQuery(question(wish, one, nil, 2, ClassIN)); err != nil || query.Name != "" || query.Type != 2 {
		t.Errorf("the root: %#v, %v", query, err)
	}
}

func TestWhatIsNoStandardQueryIsRefused(t *testing.T) {
	long := strings.Repeat("a", 63)
	good := question(wish, one, labels, TypeA, ClassIN)
	for name, c := range map[string]struct {
		data   []byte
		reason policy.Reason
	}{
		"nothing":                 {nil, "malformed"},
		"half a header":           {good[:11], "malformed"},
		"a header alone":          {good[:12], "malformed"},
		"a name cut":              {good[:20], "malformed"},
		"a question cut":          {good[:len(good)-1], "malformed"},
		"bytes behind":            {append(slices.Clone(good), 0), "malformed"},
		"a response":              {question(0x8000, one, labels, TypeA, ClassIN), "malformed"},
		"an inverse query":        {question(0x0800, one, labels, TypeA, ClassIN), "malformed"},
		"an update":               {question(0x2800, one, labels, TypeA, ClassIN), "malformed"},
		"a cut one":               {question(0x0200, one, labels, TypeA, ClassIN), "malformed"},
		"a failure":               {question(0x0003, one, labels, TypeA, ClassIN), "malformed"},
		"no question":             {question(wish, [4]uint16{0, 0, 0, 0}, labels, TypeA, ClassIN), "malformed"},
		"two questions":           {append(question(wish, [4]uint16{2, 0, 0, 0}, labels, TypeA, ClassIN), good[12:]...), "malformed"},
		"an answer":               {question(wish, [4]uint16{1, 1, 0, 0}, labels, TypeA, ClassIN), "malformed"},
		"an authority":            {question(wish, [4]uint16{1, 0, 1, 0}, labels, TypeA, ClassIN), "malformed"},
		"two additionals":         {question(wish, [4]uint16{1, 0, 0, 2}, labels, TypeA, ClassIN, append(opt, opt...)...), "malformed"},
		"an additional missing":   {question(wish, withOPT, labels, TypeA, ClassIN), "malformed"},
		"an additional cut":       {question(wish, withOPT, labels, TypeA, ClassIN, opt[:10]...), "malformed"},
		"an additional of a name": {question(wish, withOPT, labels, TypeA, ClassIN, append([]byte{1, 'a'}, opt...)...), "malformed"},
		"a signature":             {question(wish, withOPT, labels, TypeA, ClassIN, 0, 0, 250, 0, 255, 0, 0, 0, 0, 0, 0), "malformed"},
		"an option too long":      {question(wish, withOPT, labels, TypeA, ClassIN, append(slices.Clone(opt[:9]), 0, 9, 1)...), "malformed"},
		"bytes behind the option": {question(wish, withOPT, labels, TypeA, ClassIN, append(slices.Clone(opt), 1)...), "malformed"},
		"a pointer in the name":   {append(slices.Clone(good[:12]), 0xc0, 12, 0, 1, 0, 1), "malformed"},
		"an extended label":       {append(slices.Clone(good[:12]), 0x41, 1, 0, 0, 1, 0, 1), "malformed"},
		"a label of a dot":        {question(wish, one, []string{"a.b", "test"}, TypeA, ClassIN), "malformed"},
		"a label of a zero byte":  {question(wish, one, []string{"a\x00", "test"}, TypeA, ClassIN), "malformed"},
		"a label with a space":    {question(wish, one, []string{"a b"}, TypeA, ClassIN), "malformed"},
		"a label beyond ASCII":    {question(wish, one, []string{"\xe4"}, TypeA, ClassIN), "malformed"},
		"a wildcard":              {question(wish, one, []string{"*", "test"}, TypeA, ClassIN), "malformed"},
		"a name of 256 bytes":     {question(wish, one, []string{long, long, long, long[:62]}, TypeA, ClassIN), "too_large"},
		"a datagram of 513 bytes": {append(slices.Clone(good), make([]byte, 513-len(good))...), "too_large"},
	} {
		_, err := ParseQuery(c.data)

		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Reason != c.reason {
			t.Errorf("%s: %v; want %s", name, err, c.reason)
		}
		for _, answer := range [][]byte{Answer(c.data, nil, 1), NoData(c.data), NXDomain(c.data)} {
			if answer != nil {
				t.Errorf("%s is answered: %x", name, answer)
			}
		}
	}
}

// read is what another parser of DNS finds in a response.
func read(t *testing.T, response []byte) (dnsmessage.Header, []dnsmessage.Question, []string) {
	t.Helper()
	var message dnsmessage.Message
	if err := message.Unpack(response); err != nil {
		t.Fatalf("%x: %v", response, err)
	}
	if len(message.Authorities)+len(message.Additionals) != 0 {
		t.Errorf("sections %#v", message)
	}
	var addresses []string
	for _, answer := range message.Answers {
		body, ok := answer.Body.(*dnsmessage.AResource)
		if !ok || answer.Header.Name != message.Questions[0].Name {
			t.Fatalf("answer %#v", answer)
		}
		addresses = append(addresses, netip.AddrFrom4(body.A).String())
	}
	return message.Header, message.Questions, addresses
}

func TestAnAnswerIsWhatAResolverExpects(t *testing.T) {
	query := question(wish|0x10, withOPT, labels, TypeA, ClassIN, opt...)
	addresses := []netip.Addr{netip.MustParseAddr("10.137.0.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:8.8.8.8")}

	header, questions, got := read(t, Answer(query, addresses, 30))

	if header.ID != 0xabcd || !header.Response || !header.RecursionDesired || !header.RecursionAvailable || !header.CheckingDisabled || header.RCode != 0 {
		t.Errorf("header %#v", header)
	}
	if len(questions) != 1 || questions[0].Name.String() != "Images.Kalium.test." { // in the asker's own case
		t.Errorf("questions %v", questions)
	}
	if !slices.Equal(got, []string{"10.137.0.1", "8.8.8.8"}) {
		t.Errorf("addresses %v", got)
	}
}

func TestOtherAnswersHoldNoAddress(t *testing.T) {
	addresses := []netip.Addr{netip.MustParseAddr("10.137.0.1")}
	a, aaaa := question(wish, one, labels, TypeA, ClassIN), question(wish, one, labels, TypeAAAA, ClassIN)
	for name, c := range map[string]struct {
		response []byte
		code     dnsmessage.RCode
	}{
		"no data":                 {NoData(a), dnsmessage.RCodeSuccess},
		"no name":                 {NXDomain(a), dnsmessage.RCodeNameError},
		"addresses for AAAA":      {Answer(aaaa, addresses, 1), dnsmessage.RCodeSuccess},
		"addresses for any class": {Answer(question(wish, one, labels, TypeA, 255), addresses, 1), dnsmessage.RCodeSuccess},
		"no addresses":            {Answer(a, nil, 1), dnsmessage.RCodeSuccess},
	} {
		header, _, got := read(t, c.response)
		if header.RCode != c.code || len(got) != 0 {
			t.Errorf("%s: %#v, %v", name, header, got)
		}
	}
}

func TestTheLargestAnswerFitsADatagram(t *testing.T) {
	long := strings.Repeat("a", 63)
	query := question(wish, one, []string{long, long, long, long[:61]}, TypeA, ClassIN)
	addresses := slices.Repeat([]netip.Addr{netip.MustParseAddr("10.137.0.1")}, 100)

	response := Answer(query, addresses, 1)

	if _, _, got := read(t, response); len(response) > QueryBytesMax || len(got) != answersMax || answersMax < 15 {
		t.Errorf("%d bytes with %d addresses", len(response), len(got))
	}
}

// FuzzQuery: only the declared error comes out, another parser reads the same question, and every answer to an
// accepted query is one that it can read.
func FuzzQuery(f *testing.F) {
	f.Add(question(wish, one, labels, TypeA, ClassIN))
	f.Add(question(wish, withOPT, labels, TypeAAAA, ClassIN, opt...))
	f.Add(question(wish, one, nil, 2, ClassIN))
	f.Fuzz(func(t *testing.T, data []byte) {
		query, err := ParseQuery(data)
		if err != nil {
			var refused *wire.Error
			if !errors.As(err, &refused) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		var parser dnsmessage.Parser
		header, err := parser.Start(data)
		if err != nil {
			t.Fatal(err)
		}
		asked, err := parser.Question()
		if err != nil || header.ID != query.ID || strings.ToLower(asked.Name.String()) != query.Name+"." ||
			uint16(asked.Type) != query.Type || uint16(asked.Class) != query.Class {
			t.Fatalf("%#v, %#v, %v", query, asked, err)
		}
		for _, response := range [][]byte{Answer(data, []netip.Addr{netip.MustParseAddr("1.2.3.4")}, 5), NoData(data), NXDomain(data)} {
			if len(response) > QueryBytesMax {
				t.Fatalf("an answer of %d bytes", len(response))
			}
			if header, _, _ := read(t, response); header.ID != query.ID || !header.Response {
				t.Fatalf("%#v", header)
			}
		}
	})
}
