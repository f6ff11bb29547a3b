// Package shim is gVisor's shim for containerd, which starts also on hosts that may not lower a process's score for the
// kernel's out-of-memory killer: gVisor's own ends there. Hosts that are containers themselves are such hosts.
package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"syscall"

	"github.com/containerd/containerd/namespaces"
	containerd "github.com/containerd/containerd/runtime/v2/shim"
	"github.com/containerd/containerd/sys"
	gvisor "gvisor.dev/gvisor/pkg/shim/v1"
)

const (
	addressFile = "address" // in the bundle's folder, where containerd looks for them
	pidFile     = "shim.pid"
	oomScore    = -999 // as gVisor's: the last of what can be killed
)

// New returns gVisor's shim with a start of ours.
func New(ctx context.Context, id string, publisher containerd.Publisher, cancel func()) (containerd.Shim, error) {
	inner, err := gvisor.New(ctx, id, publisher, cancel)
	if err != nil {
		return nil, err
	}
	options, _ := ctx.Value(containerd.OptsKey{}).(containerd.Opts)
	return &service{Shim: inner, debug: options.Debug}, nil
}

type service struct {
	containerd.Shim
	debug bool
}

// StartShim starts the process that serves a container, or finds it, and returns its address. It runs in the bundle's
// folder.
func (s *service) StartShim(ctx context.Context, opts containerd.StartOpts) (string, error) {
	address, err := containerd.SocketAddress(ctx, opts.Address, opts.ID)
	if err != nil {
		return "", err
	}
	listener, err := containerd.NewSocket(address)
	if containerd.SocketEaddrinuse(err) {
		if containerd.CanConnect(address) {
			return address, containerd.WriteAddress(addressFile, address)
		}
		// Its owner was killed.
		if err := containerd.RemoveSocket(address); err != nil {
			return "", fmt.Errorf("remove the old socket: %w", err)
		}
		listener, err = containerd.NewSocket(address)
	}
	if err != nil {
		return "", fmt.Errorf("make the socket: %w", err)
	}
	file, err := listener.File()
	if err == nil {
		err = s.serve(ctx, opts, file)
		err = errors.Join(err, file.Close())
	}
	if err == nil {
		err = containerd.WriteAddress(addressFile, address)
	}
	if err != nil {
		return "", errors.Join(err, listener.Close(), containerd.RemoveSocket(address))
	}
	return address, nil
}

// serve starts this program again, as the one that serves on socket for as long as the container exists.
func (s *service) serve(ctx context.Context, opts containerd.StartOpts, socket *os.File) error {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{"-namespace", namespace, "-address", opts.Address, "-publish-binary", opts.ContainerdBinary}
	if s.debug {
		args = append(args, "-debug")
	}
	command := exec.Command(self, args...)
	command.Env = append(os.Environ(), "GOMAXPROCS=2")
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.ExtraFiles = []*os.File{socket}
	if err := command.Start(); err != nil {
		return err
	}
	err = containerd.WritePidFile(pidFile, command.Process.Pid)
	if err == nil {
		err = lowerScore(command.Process.Pid)
	}
	if err != nil {
		return errors.Join(err, command.Process.Kill(), command.Wait())
	}
	return nil
}

// lowerScore keeps the kernel from choosing the shim, where it may be asked to. Elsewhere the shim is as likely to be
// killed as its parent, and containerd cleans up after it. It says nothing of it: containerd takes whatever the start of a
// shim writes, to either stream, for its address.
func lowerScore(pid int) error {
	err := sys.SetOOMScore(pid, oomScore)
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}
