// Package sentry puts the guard into gVisor: into its table of system calls, and, through a sink of its event
// mechanism, into each sandbox's start.
package sentry

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/abi"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/arch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"

	"kalium.dev/kalium/runtime/internal/mediation"
)

// wrapper puts our function in front of gVisor's. It may look at the arguments only. One that looked a descriptor up
// before it called original would be a hole: original looks it up again, and another thread may have put another file
// there.
type wrapper func(original kernel.SyscallFn) kernel.SyscallFn

var wrappers = map[string]wrapper{
	"socket":     socketCall,
	"socketpair": socketPairCall,
	"setsockopt": refuseIf(linuxerr.ENOPROTOOPT, func(a arch.SyscallArguments) bool {
		return mediation.OptionClass(a[1].Int(), a[2].Int()) == mediation.Refused
	}),
	"ioctl": refuseIf(linuxerr.ENOTTY, func(a arch.SyscallArguments) bool {
		return mediation.IoctlClass(a[1].Uint()) == mediation.Refused
	}),
	"clone":   refuseIf(linuxerr.EPERM, newNetwork),
	"unshare": refuseIf(linuxerr.EPERM, newNetwork),
	"setns":   refuseIf(linuxerr.EPERM, intoNetwork),
	"clone3":  func(kernel.SyscallFn) kernel.SyscallFn { return clone3Call },

	"exit":       exitCall(false),
	"exit_group": exitCall(true),
}

// preparing are calls in front of which something is made ready. Nothing about the call itself changes.
var preparing = map[string]wrapper{"open": offerKeys, "openat": offerKeys, "creat": offerKeys}

// Install changes gVisor's table of system calls as package mediation says. It must run before the first sandbox.
func Install() error {
	table, found := kernel.LookupSyscallTable(abi.Linux, arch.Host)
	if !found {
		return fmt.Errorf("gVisor has no system call table for %v", arch.Host)
	}
	for number, call := range table.Table {
		line, _ := mediation.Of(mediation.Calls, call.Name) // a call without a line has the zero class, which refuses
		switch line.Class {
		case mediation.EndsAtEndpoint, mediation.Inside, mediation.Absent:
			prepare, found := preparing[call.Name]
			if !found {
				continue
			}
			call.Fn = prepare(call.Fn)
		case mediation.Replaced:
			wrap, found := wrappers[call.Name]
			if !found {
				return fmt.Errorf("no function replaces system call %s", call.Name)
			}
			call.Fn = wrap(call.Fn)
		default:
			call.Fn = refused
		}
		table.Table[number] = call
	}
	table.Init()
	return nil
}

func refused(*kernel.Task, uintptr, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, linuxerr.ENOSYS
}

func refuseIf(err error, rule func(arch.SyscallArguments) bool) wrapper {
	return func(original kernel.SyscallFn) kernel.SyscallFn {
		return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
			if rule(a) {
				return 0, nil, err
			}
			return original(t, number, a)
		}
	}
}

// newNetwork tells clone and unshare that make a network namespace. The linked gVisor does not check the right to move
// an interface into one, and there the program would have every capability.
func newNetwork(a arch.SyscallArguments) bool { return a[0].Uint()&linux.CLONE_NEWNET != 0 }

// intoNetwork tells a setns that may enter a network namespace. Type 0 stands for whatever the descriptor is, which only
// the call itself may look up. With any other type the linked gVisor takes a descriptor of that type and of no other.
func intoNetwork(a arch.SyscallArguments) bool {
	kind := a[1].Int()
	return kind == 0 || kind&linux.CLONE_NEWNET != 0
}

// clone3Call is clone3(2), whose flags are in memory. gVisor's own function would read them again after a check of
// ours, and another thread could change them in between.
func clone3Call(t *kernel.Task, _ uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	size := a[1].SizeT()
	if size < linux.CLONE_ARGS_SIZE_VER0 || size > linux.CLONE_ARGS_SIZE_VER2 {
		return 0, nil, linuxerr.EINVAL
	}
	var args linux.CloneArgs
	if _, err := args.CopyInN(t, a[0].Pointer(), int(size)); err != nil {
		return 0, nil, err
	}
	if args.Flags&linux.CLONE_NEWNET != 0 {
		return 0, nil, linuxerr.EPERM
	}
	id, control, err := t.Clone(&args)
	if err != nil {
		return 0, nil, err
	}
	return uintptr(id), control, err
}
