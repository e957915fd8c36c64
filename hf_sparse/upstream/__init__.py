"""What hf_sparse uses of other packages beyond their public interface: one module for each package.

Nothing else in hf_sparse names a private attribute of another package, or imports a module that its
package does not document; `tests/upstream` checks that, and tries every function here on the installed
versions: when a new release moves something, the failing test names the function to adapt.

Modules are imported one by one by those who need them; this one imports none.
"""
