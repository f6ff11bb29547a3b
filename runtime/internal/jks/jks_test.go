package jks

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

func TestTheLayout(t *testing.T) {
	store := Trusting(time.UnixMilli(0x0102030405), []byte("DER"))

	want := "\xfe\xed\xfe\xed" + "\x00\x00\x00\x02" + "\x00\x00\x00\x01" +
		"\x00\x00\x00\x02" + "\x00\x08kalium-0" + "\x00\x00\x00\x01\x02\x03\x04\x05" + "\x00\x05X.509" + "\x00\x00\x00\x03DER"
	if !bytes.HasPrefix(store, []byte(want)) || len(store) != len(want)+20 {
		t.Errorf("%q", store)
	}
}

func TestJavaReadsIt(t *testing.T) {
	keytool, err := exec.LookPath("keytool")
	if err != nil {
		t.Skip("no Java on this machine")
	}
	path := filepath.Join(t.TempDir(), "store.jks")
	first, second := guardtest.Certificate(t, "a.test"), guardtest.Certificate(t, "b.test")
	if err := os.WriteFile(path, Trusting(time.Now(), first.Certificate[0], second.Certificate[0]), 0o600); err != nil {
		t.Fatal(err)
	}

	listed, err := exec.Command(keytool, "-list", "-keystore", path, "-storepass", Password).CombinedOutput()

	if err != nil || strings.Count(string(listed), "trustedCertEntry") != 2 {
		t.Errorf("%v: %s", err, listed)
	}
	if said, err := exec.Command(keytool, "-list", "-keystore", path, "-storepass", "another").CombinedOutput(); err == nil {
		t.Errorf("another password: %s", said)
	}
}
