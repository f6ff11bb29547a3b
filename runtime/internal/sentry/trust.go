package sentry

import (
	"encoding/pem"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/fspath"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"

	"kalium.dev/kalium/runtime/internal/jks"
)

// Where programs whose TLS ends in the guard find what they have to trust. These are plain files of the sandbox's own
// /dev, which is in its memory: the authority is made in the Sentry, so nobody outside could write them, and Java does not
// look at a trust store that is a device.
const (
	trustPath     = "/dev/kalium-ca"
	trustJavaPath = "/dev/kalium-ca.jks"

	annotationTLS = "kalium.io/tls"
	tlsTerminate  = "terminate"
)

// trusting are the containers that have the files.
var trusting sync.Map

// offerTrust writes the files before the first system call of a container that opens one. Whoever is in the sandbox may
// change them: that deceives nobody but itself.
func offerTrust(t *kernel.Task) {
	container := t.ContainerID()
	if _, found := trusting.Load(container); found {
		return
	}
	if _, found := trusting.LoadOrStore(container, true); found {
		return
	}
	g := installed.Load()
	if g == nil || !wantsTrust(started) && !g.Terminates() {
		return
	}
	trust := g.Trust()
	var certificates [][]byte
	for rest := trust; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		certificates = append(certificates, block.Bytes)
	}
	for path, content := range map[string][]byte{trustPath: trust, trustJavaPath: jks.Trusting(time.Now(), certificates...)} {
		if err := writeInside(t, path, content); err != nil {
			log.Warningf("kalium: %s: %v; programs will not trust the guard", path, err)
		}
	}
}

func wantsTrust(c *command) bool {
	return c != nil && c.spec != nil && c.spec.Annotations[annotationTLS] == tlsTerminate
}

// writeInside makes a new file as the container's root sees it.
func writeInside(t *kernel.Task, path string, content []byte) error {
	root := t.FSContext().RootDirectory()
	defer root.DecRef(t)
	fd, err := t.Kernel().VFS().OpenAt(t, auth.NewRootCredentials(t.UserNamespace().Root()), &vfs.PathOperation{Root: root, Start: root, Path: fspath.Parse(path)},
		&vfs.OpenOptions{Flags: linux.O_WRONLY | linux.O_CREAT | linux.O_EXCL, Mode: 0o444})
	if err != nil {
		return err
	}
	defer fd.DecRef(t)
	for len(content) > 0 {
		n, err := fd.Write(t, usermem.BytesIOSequence(content), vfs.WriteOptions{})
		if err != nil {
			return err
		}
		content = content[n:]
	}
	return nil
}
