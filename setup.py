"""What pyproject.toml cannot say: the wheel carries `configs/` inside the package."""

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRunFiles(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", f"{self.build_lib}/sparse_gpt/configs")


setup(cmdclass={"build_py": WithRunFiles})
