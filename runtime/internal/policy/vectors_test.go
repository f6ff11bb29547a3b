package policy

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The shapes of tests/vectors/policies, which its README describes.
type (
	policyVector struct {
		Name, What, Source, Compiled string
		Runs                         []run
		AppRuns                      json.RawMessage `json:"app_runs"` // of the controller's automaton
	}
	run struct {
		Function string
		Startup  bool
		Steps    []step
		MayEnd   bool `json:"may_end"`
	}
	step struct {
		Message struct {
			Kind, Peer, Method, Path, Callee, Callback, Verb, From string
			Query, Read, Write, To                                 []string
			Upgrade, GRPC, Asynchronous                            bool
		}
		Text          string
		Tail, Allowed bool
		Reason        Reason
		Line, Retries int
		States        []int
		Expected      []string
	}
	refusedVector struct {
		Name, Compiled, Code string
		PadToBytes           json.Number `json:"pad_to_bytes"` // as a number or as a text
	}
	envelopeVectors struct {
		PublicKey string `json:"public_key"`
		KeyID     string `json:"key_id"`
		Good      []struct {
			Name, Envelope, App string
			Version             int
		}
		Refused []struct{ Name, Envelope, Code string }
	}
)

const vectorsFolder = "../../../tests/vectors/policies"

func readVector(t testing.TB, name string, into any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(vectorsFolder, name))
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// policyVectors reads every file that holds a policy and what it judges.
func policyVectors(t testing.TB) []policyVector {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(vectorsFolder, "*.json"))
	if err != nil || len(paths) < 5 {
		t.Fatalf("%d files of vectors, %v", len(paths), err)
	}
	var all []policyVector
	for _, path := range paths {
		if name := filepath.Base(path); name != "refused.json" && name != "envelopes.json" {
			var v policyVector
			readVector(t, name, &v)
			all = append(all, v)
		}
	}
	return all
}

func TestTheSharedPoliciesJudgeAsTheVectorsSay(t *testing.T) {
	steps := 0
	for _, v := range policyVectors(t) {
		p, err := Parse([]byte(v.Compiled))
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		for i, run := range v.Runs {
			function := p.Functions[run.Function]
			if run.Startup {
				function = function.Startup
			}
			cursor := function.Start()
			for j, step := range run.Steps {
				steps++
				message := &Message{
					Kind: kindOf(step.Message.Kind), Peer: step.Message.Peer, Method: step.Message.Method, Path: step.Message.Path,
					Query: step.Message.Query, Callee: step.Message.Callee, Verb: step.Message.Verb, Read: step.Message.Read,
					Write: step.Message.Write, From: step.Message.From, To: step.Message.To,
					Upgrade: step.Message.Upgrade, GRPC: step.Message.GRPC, Asynchronous: step.Message.Asynchronous, Callback: step.Message.Callback,
				}
				judge := function.Step
				if step.Tail {
					judge = function.StepTail
				}
				verdict, next := judge(cursor, message)

				want := Verdict{
					Allowed: step.Allowed, Reason: step.Reason, Expected: step.Expected, Line: step.Line, States: step.States, Retries: step.Retries,
				}
				if len(want.Expected) == 0 {
					want.Expected = nil
				}
				if !reflect.DeepEqual(verdict, want) || message.Text() != step.Text || !slices.Equal(next.States(), step.States) {
					t.Errorf("%s, run %d, step %d: %q, %#v, next %v; want %q, %#v", v.Name, i, j, message.Text(), verdict, next.States(), step.Text, want)
				}
				cursor = next
			}
			if function.Accepts(cursor) != run.MayEnd {
				t.Errorf("%s, run %d: it may end: %t", v.Name, i, !run.MayEnd)
			}
		}
	}
	if steps < 100 {
		t.Errorf("only %d steps were judged", steps)
	}
}

func TestTheSharedRefusalsAreRefused(t *testing.T) {
	var vectors []refusedVector
	readVector(t, "refused.json", &vectors)
	for _, v := range vectors {
		text := v.Compiled
		if v.PadToBytes != "" {
			size, err := v.PadToBytes.Int64()
			if err != nil {
				t.Fatalf("%s: %v", v.Name, err)
			}
			text += strings.Repeat(" ", int(size)-len(text))
		}

		_, err := Parse([]byte(text))

		var known *Error
		if !errors.As(err, &known) || known.Code != v.Code {
			t.Errorf("%s: %v, want %s", v.Name, err, v.Code)
		}
	}
	if len(vectors) < 50 {
		t.Errorf("only %d vectors", len(vectors))
	}
}

func TestTheSharedEnvelopesHold(t *testing.T) {
	var vectors envelopeVectors
	readVector(t, "envelopes.json", &vectors)
	raw, err := base64.StdEncoding.DecodeString(vectors.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	key := ed25519.PublicKey(raw)
	if KeyID(key) != vectors.KeyID {
		t.Errorf("key id %s, want %s", KeyID(key), vectors.KeyID)
	}
	for _, v := range vectors.Good {
		if p, err := Verify([]byte(v.Envelope), key); err != nil || p.App != v.App || p.Version != v.Version {
			t.Errorf("%s: %#v, %v", v.Name, p, err)
		}
	}
	for _, v := range vectors.Refused {
		_, err := Verify([]byte(v.Envelope), key)

		var known *Error
		if !errors.As(err, &known) || known.Code != v.Code {
			t.Errorf("%s: %v, want %s", v.Name, err, v.Code)
		}
	}
	if len(vectors.Good) == 0 || len(vectors.Refused) == 0 {
		t.Error("no vectors")
	}
}
