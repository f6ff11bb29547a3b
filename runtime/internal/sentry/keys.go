package sentry

import (
	"sync"

	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/sentry/arch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"
)

// The number of the key device. Major 60 is for local use (Linux's list of devices), and gVisor gives it to nobody.
const (
	keysMajor = 60
	keysMinor = 0
)

var keysOnce sync.Once

// offerKeys is in front of the system calls that open files. It makes the key device known before the first of them can
// have found its node, which the bundle asks for (see bundle.go): gVisor tells nobody else of a new kernel.
func offerKeys(original kernel.SyscallFn) kernel.SyscallFn {
	return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
		keysOnce.Do(func() {
			if err := t.Kernel().VFS().RegisterDevice(vfs.CharDevice, keysMajor, keysMinor, keyDevice{}, &vfs.RegisterDeviceOptions{GroupName: "kalium"}); err != nil {
				log.Warningf("kalium: no key device, so no TLS connection will be opened: %v", err)
			}
		})
		offerTrust(t)
		return original(t, number, a)
	}
}

// keyDevice takes the lines of TLS key logs. A line is known when write(2) returns, so before the first record that is
// protected by its key. Nothing is stored and nothing can be read.
type keyDevice struct{}

// Open implements vfs.Device.
func (keyDevice) Open(ctx context.Context, mount *vfs.Mount, d *vfs.Dentry, o vfs.OpenOptions) (*vfs.FileDescription, error) {
	f := &keyFile{}
	if g := installed.Load(); g != nil {
		f.keys = g.Keys().Writer()
	}
	f.LockFD.Init(&vfs.FileLocks{})
	if err := f.fd.Init(f, o.Flags, auth.CredentialsFromContext(ctx), mount, d, &vfs.FileDescriptionOptions{UseDentryMetadata: true}); err != nil {
		return nil, err
	}
	return &f.fd, nil
}

// keyFile is one open file. Lines of two of them do not mix.
type keyFile struct {
	fd vfs.FileDescription
	vfs.FileDescriptionDefaultImpl
	vfs.DentryMetadataFileDescriptionImpl
	vfs.LockFD

	mu     sync.Mutex
	keys   interface{ Write([]byte) (int, error) } // nil without a guard
	buffer [4096]byte
}

// Release implements vfs.FileDescriptionImpl.
func (*keyFile) Release(context.Context) {}

// Write implements vfs.FileDescriptionImpl. It takes everything, also what is no key.
func (f *keyFile) Write(ctx context.Context, source usermem.IOSequence, _ vfs.WriteOptions) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var total int64
	for source.NumBytes() > 0 {
		n, err := source.CopyIn(ctx, f.buffer[:])
		if n > 0 && f.keys != nil {
			f.keys.Write(f.buffer[:n]) // takes everything
		}
		total += int64(n)
		if err != nil {
			if total > 0 {
				return total, nil
			}
			return 0, err
		}
		source = source.DropFirst(n)
	}
	clear(f.buffer[:])
	return total, nil
}

// PWrite implements vfs.FileDescriptionImpl. There are no positions.
func (f *keyFile) PWrite(ctx context.Context, source usermem.IOSequence, _ int64, o vfs.WriteOptions) (int64, error) {
	return f.Write(ctx, source, o)
}
