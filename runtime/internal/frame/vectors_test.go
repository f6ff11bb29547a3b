package frame

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"testing"
)

// vector is one entry of tests/vectors/frames.json; its README says what the fields mean.
type vector struct {
	Name   string
	Hex    string
	Type   Type
	ID     uint32
	Fields map[string]any
	Error  string
}

func vectors(t *testing.T) []vector {
	t.Helper()
	data, err := os.ReadFile("../../../tests/vectors/frames.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []vector
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	decoder.UseNumber()
	if err := decoder.Decode(&all); err != nil {
		t.Fatal(err)
	}
	if len(all) < 100 {
		t.Fatalf("only %d vectors", len(all))
	}
	return all
}

func TestTheSharedVectorsHold(t *testing.T) {
	good, bad := 0, 0
	for _, v := range vectors(t) {
		data, err := hex.DecodeString(v.Hex)
		if err != nil {
			t.Fatalf("%s: %v", v.Name, err)
		}
		if v.Error != "" {
			bad++
			checkRefused(t, v, data)
			continue
		}
		good++
		id, m, n, err := Decode(data)
		if err != nil || n != len(data) || id != v.ID || m.Type() != v.Type {
			t.Errorf("%s: id %d, %#v, %d of %d bytes, %v", v.Name, id, m, n, len(data), err)
			continue
		}
		fields := m.fields()
		if i, ok := m.(identified); ok && *i.identity() != (Identity{}) {
			fields = withIdentity(fields, i.identity())
		}
		got := map[string]any{}
		for _, f := range fields {
			got[f.name] = asJSON(t, f.value)
		}
		if !reflect.DeepEqual(got, v.Fields) {
			t.Errorf("%s: fields %v, want %v", v.Name, got, v.Fields)
		}
		if again, err := Append(nil, id, m); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%s: written as %x, %v", v.Name, again, err)
		}
	}
	if good == 0 || bad == 0 {
		t.Errorf("%d good and %d bad vectors", good, bad)
	}
}

// checkRefused feeds the stream byte by byte: either an error comes out, or the end of the stream is inside a frame.
func checkRefused(t *testing.T, v vector, data []byte) {
	t.Helper()
	var reader Reader
	for i := range data {
		reader.Feed(data[i : i+1])
		_, m, err := reader.Next()
		var broken *Error
		switch {
		case errors.As(err, &broken):
			return
		case err == nil && v.Error != "truncated":
			t.Errorf("%s: read as %#v", v.Name, m)
			return
		}
	}
	if reader.Held() == 0 {
		t.Errorf("%s: the stream ends clean", v.Name)
	}
}

// asJSON turns a field into what encoding/json makes of the vector's field.
func asJSON(t *testing.T, value any) any {
	t.Helper()
	switch v := value.(type) {
	case *[]byte:
		return map[string]any{"$bin": base64.StdEncoding.EncodeToString(*v)}
	case *map[string][]byte:
		out := map[string]any{}
		for name, data := range *v {
			out[name] = asJSON(t, &data)
		}
		return out
	case record:
		out := map[string]any{}
		for _, f := range v.fields() {
			out[f.name] = asJSON(t, f.value)
		}
		return out
	}
	data, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var out any
	if err := decoder.Decode(&out); err != nil {
		t.Fatal(err)
	}
	return out
}
