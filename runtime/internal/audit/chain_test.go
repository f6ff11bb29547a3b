package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
)

const vectors = "../../../tests/vectors/audit/"

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func testKey() ed25519.PrivateKey {
	seed := make([]byte, ed25519.SeedSize)
	for i := range seed {
		seed[i] = byte(i)
	}
	return ed25519.NewKeyFromSeed(seed)
}

func TestLinesAreThoseOfThePythonWriter(t *testing.T) {
	var document struct {
		Seed string
		Who  Writer
		Runs []struct {
			Name  string
			Found struct {
				Seq       int64
				Hash      string
				FileSeq   int64 `json:"file_seq"`
				FileBytes int64 `json:"file_bytes"`
			}
			BytesMax int64 `json:"bytes_max"`
			Steps    []struct {
				Do     string
				NowMS  int64 `json:"now_ms"`
				Event  string
				Fields json.RawMessage
				Torn   []byte
			}
			Parts []struct{ Rotated, Data string }
		}
	}
	if err := json.Unmarshal(must(os.ReadFile(vectors+"written.json")), &document); err != nil {
		t.Fatal(err)
	}
	for _, run := range document.Runs {
		c := &Chain{
			Who: document.Who, Key: ed25519.NewKeyFromSeed(must(hex.DecodeString(document.Seed))), BytesMax: run.BytesMax,
			Place: Place{run.Found.Seq, run.Found.Hash}, FileSeq: run.Found.FileSeq, FileBytes: run.Found.FileBytes,
		}
		for _, step := range run.Steps {
			switch step.Do {
			case "open":
				c.Open(step.NowMS, step.Torn)
			case "append":
				var fields bytes.Buffer
				if err := json.Compact(&fields, step.Fields); err != nil {
					t.Fatal(err)
				}
				if err := c.Append(step.Event, fields.Bytes(), step.NowMS); err != nil {
					t.Fatal(err)
				}
			case "seal":
				c.Seal(step.NowMS)
			case "start_file":
				c.StartFile(step.NowMS)
			default:
				t.Fatalf("step %s", step.Do)
			}
		}
		waiting := c.Waiting()
		parts := c.Take()
		total := 0
		for i, part := range parts {
			total += len(part.Data)
			if i >= len(run.Parts) || string(part.Data) != run.Parts[i].Data || part.Rotated != run.Parts[i].Rotated {
				t.Errorf("%s: part %d is\n%s%s", run.Name, i, part.Rotated, part.Data)
			}
		}
		if len(parts) != len(run.Parts) || waiting != total || c.Waiting() != 0 {
			t.Errorf("%s: %d parts, not %d; %d bytes waited, %d after it", run.Name, len(parts), len(run.Parts), waiting, c.Waiting())
		}
	}
	if len(document.Runs) < 10 {
		t.Errorf("%d runs", len(document.Runs))
	}
}

// The vectors come from the twin, which could be wrong in the same way: one line by hand.
func TestALineIsWhatTheSpecificationSays(t *testing.T) {
	c := &Chain{Who: Writer{"agent", "n", "r", "l"}, Key: testKey(), BytesMax: 1 << 20}
	if err := c.Append(EventVerdict, []byte(`{"id":"x"}`), 5); err != nil {
		t.Fatal(err)
	}
	c.Seal(6)

	lines := strings.SplitAfter(string(c.Take()[0].Data), "\n")

	zeros := strings.Repeat("0", 64)
	entry := `{"seq":1,"time_ms":5,"event":"verdict","id":"x"}`
	own := fmt.Sprintf("%x", sha256.Sum256([]byte(zeros+"\n"+entry)))
	if want := `{"prev":"` + zeros + `","hash":"` + own + `","entry":` + entry + "}\n"; lines[0] != want {
		t.Errorf("%s", lines[0])
	}
	signature := ed25519.Sign(testKey(), []byte("kalium-audit/v1\n"+own+"\n2\n6"))
	if want := `"entry":{"seq":2,"time_ms":6,"event":"head","signature":"` + base64.StdEncoding.EncodeToString(signature) + "\"}}\n"; !strings.HasSuffix(lines[1], want) {
		t.Errorf("%s", lines[1])
	}
}

func TestAnEntryThatIsTooLongIsRefusedAndAddsNothing(t *testing.T) {
	c := &Chain{Key: testKey(), BytesMax: 1 << 20}

	err := c.Append(EventVerdict, []byte(`{"a":"`+strings.Repeat("x", entryBytesMax)+`"}`), 0)

	if err == nil || c.Waiting() != 0 || c.Place.Seq != 0 {
		t.Errorf("%v, %d bytes, %v", err, c.Waiting(), c.Place)
	}
}

func TestTheEndsOfAFileAreReadAsInPython(t *testing.T) {
	var cases []struct {
		Name       string
		Data       string
		Error      bool
		Seq        int64
		Hash       string
		FirstSeq   int64 `json:"first_seq"`
		Log        string
		WholeBytes int64 `json:"whole_bytes"`
		TornBytes  int   `json:"torn_bytes"`
	}
	if err := json.Unmarshal(must(os.ReadFile(vectors+"found.json")), &cases); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		data := []byte(c.Data) // Latin-1 below 0x80

		got, err := readEnds(bytes.NewReader(data), int64(len(data)))

		if (err != nil) != c.Error {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		want := found{firstSeq: c.FirstSeq, log: c.Log, last: Place{c.Seq, c.Hash}, wholeBytes: c.WholeBytes}
		torn := got.torn
		got.torn = nil
		if err == nil && (!reflect.DeepEqual(got, want) || len(torn) != c.TornBytes || !bytes.HasSuffix(data, torn)) {
			t.Errorf("%s: %+v and %d torn bytes", c.Name, got, len(torn))
		}
	}
	if len(cases) < 10 {
		t.Errorf("%d cases", len(cases))
	}
}

func TestATailWithoutALineFeedIsNoTornLineWhenItIsTooLong(t *testing.T) {
	for _, size := range []int{tornBytesMax, tornBytesMax + 1, tornBytesMax + lineBytesMax + 1} {
		data := bytes.Repeat([]byte{0}, size)

		got, err := readEnds(bytes.NewReader(data), int64(size))

		if (err != nil) != (size > tornBytesMax) || err == nil && len(got.torn) != size {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	c := &Chain{Key: testKey(), BytesMax: 1 << 40}
	fields := []byte(`{"id":"00f1e2d300000001","node":"node-0","message":"` + strings.Repeat("x", 400) + `"}`)
	for b.Loop() {
		if err := c.Append(EventVerdict, fields, 0); err != nil {
			b.Fatal(err)
		}
		if c.Waiting() > 1<<20 {
			c.Take()
		}
	}
}

// Whatever somebody has put into the file, it is taken or refused.
func FuzzTheEndsOfAFile(f *testing.F) {
	c := &Chain{Who: Writer{"agent", "n", "00f1e2d3c4b5a697", "fedcba9876543210"}, Key: testKey(), BytesMax: 1 << 20}
	c.Open(1, nil)
	c.Seal(2)
	f.Add(c.Take()[0].Data)
	f.Add([]byte("{\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readEnds(bytes.NewReader(data), int64(len(data)))

		if err == nil && got.wholeBytes+int64(len(got.torn)) != int64(len(data)) {
			t.Errorf("%d whole bytes and %d torn ones of %d", got.wholeBytes, len(got.torn), len(data))
		}
	})
}
