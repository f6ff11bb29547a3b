package agent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTrustRootsReachTheGuardsThatNeedThem(t *testing.T) {
	s := newSite(t)
	certificate, _ := newAuthority(t).issue(roleController, "x")
	s.config.TLSRoots = filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(s.config.TLSRoots, append([]byte("# a comment\n"), certificate...), 0o600); err != nil {
		t.Fatal(err)
	}
	s.controller.offer("shop", s.sign(bytes.Replace(compiled("shop", 1), []byte(`"tls":"open"`), []byte(`"tls":"terminate"`), 1)))
	s.controller.start()
	s.start()
	s.untilConnected()
	s.register("c1", "pay")
	s.register("c2", "ship")

	_, welcome := s.hello("c1", "shop", "pay")
	_, open := s.hello("c2", "shop", "ship")

	if !welcome.OK || !bytes.Equal(welcome.Roots, certificate) {
		t.Errorf("terminated: %q", welcome.Roots)
	}
	if !open.OK || len(open.Roots) != 0 {
		t.Errorf("opened: %q", open.Roots)
	}
}

func TestTrustRootsThatCannotBeUsedEndTheStart(t *testing.T) {
	certificate, key := newAuthority(t).issue(roleController, "x")
	for name, content := range map[string][]byte{
		"nothing":  {},
		"no PEM":   []byte("roots"),
		"a key":    append(bytes.Clone(certificate), key...),
		"broken":   bytes.Replace(certificate, []byte("MII"), []byte("MIJ"), 1),
		"too much": bytes.Repeat(certificate, rootsBytesMax/len(certificate)+1),
	} {
		path := filepath.Join(t.TempDir(), "roots.pem")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}

		err := (&Config{TLSRoots: path}).checkRoots()

		var known *Error
		if !errors.As(err, &known) || known.Code != "agent.config" || !strings.Contains(err.Error(), "\nnext: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
